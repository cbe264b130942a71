"""The reward of a response: named components, each with its own pattern, tasks and weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sluice.config.rewards import RewardConfig
from sluice.errors import RewardError
from sluice.nearest import did_you_mean
from sluice.rewards.base import GroupVerifier, Score, Submission, Verifier, VerifierFailure, as_score, shown
from sluice.rewards.make import make_verifier
from sluice.rewards.means import Means
from sluice.rewards.pattern import EXTRACT_SECONDS, TimedPattern
from sluice.rewards.remote import ServiceError
from sluice.types import Prompt, Reward


@dataclass(frozen=True, slots=True)
class Component:
    """One verifier with its place in the reward."""

    name: str
    weight: float
    tasks: frozenset[str]
    pattern: TimedPattern | None
    verifier: Verifier | GroupVerifier

    def applies(self, task: str) -> bool:
        """Whether prompts of this task are scored by it."""
        return not self.tasks or task in self.tasks

    @property
    def compares(self) -> bool:
        """Whether it sees all answers of a group at once."""
        return hasattr(self.verifier, "compare")


@dataclass(frozen=True, slots=True)
class Response:
    """An episode that is to be compared with the others of its group.

    Attributes:
        text: the last turn that the policy wrote.
        reward: what the components that look at one episode alone have given it.
    """

    episode_id: str
    text: str
    info: Mapping[str, Any]
    reward: Reward


class Rubric:
    """Scores responses with every component that applies to the prompt's task.

    Args:
        configs: the components.
        means: what components need from outside: see `Means`.

    Raises:
        RewardError: a component is set up wrongly.
    """

    def __init__(self, configs: Sequence[RewardConfig], means: Means | None = None) -> None:
        self._means = means or Means()
        self._components = tuple(_component(config, self._means) for config in configs)
        names = [component.name for component in self._components]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RewardError(f"two reward components are called {twice[0]!r}", hint="give each a `name`")

    async def close(self) -> None:
        """End connections and worker processes. Nothing can be scored afterwards."""
        await self._means.close()

    def check(self, tasks: Iterable[str], *, complete: bool = False) -> None:
        """Check that every task has a component.

        Args:
            tasks: names of tasks that will be scored.
            complete: these are all tasks of the run, so a component limited to another one is a mistake.

        Raises:
            RewardError: a task has no component, or a component is limited to a task that no prompt has.
        """
        known = set(tasks)
        for task in sorted(known):
            if not any(component.applies(task) for component in self._components):
                limits = sorted({name for component in self._components for name in component.tasks})
                raise RewardError(
                    f"no reward component applies to task {task!r}; they are limited to {', '.join(limits)}",
                    hint="add the task to a component's `tasks`, or leave its `tasks` empty",
                )
        for component in self._components if complete else ():
            for task in sorted(component.tasks - known):
                raise RewardError(
                    f"reward {component.name!r} is limited to task {task!r}, which no prompt has",
                    hint=did_you_mean(task, known),
                )

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Check that every component can score every prompt it applies to, before anything is sampled.

        Raises:
            RewardError: a prompt without usable ground truth, or not from reasoning-gym.
        """
        for prompt in prompts:
            for component in self._applicable(prompt):
                _check(component, prompt)

    def compares(self, task: str) -> bool:
        """Whether episodes of this task have their whole reward only when their group is complete."""
        return any(component.compares and component.applies(task) for component in self._components)

    async def reward(
        self, prompt: Prompt, response: str, *, episode_id: str, info: Mapping[str, Any] | None = None
    ) -> Reward:
        """The score by every applicable component that looks at one episode alone.

        Args:
            response: the last turn that the policy wrote.
            info: of the episode.

        Raises:
            VerifierFailure: a component raised, timed out or returned something that is no finite number.
            RewardError: no component applies to the prompt's task.
        """
        if not self._applicable(prompt):
            self.check([prompt.task])
        given = _Gathered()
        for component in self._applicable(prompt):
            if not component.compares:
                given.put(component, prompt, await _score(component, prompt, response, episode_id, info or {}))
        return given.reward()

    async def compare(self, prompt: Prompt, responses: Sequence[Response]) -> list[Reward]:
        """The whole rewards of a group, in order: what each has, and the scores of the components that compare.

        Args:
            responses: the members whose outcome counts, at least one.

        Raises:
            VerifierFailure: as for `reward`.
        """
        given = [_Gathered(dict(r.reward.components), dict(r.reward.weights), dict(r.reward.notes)) for r in responses]
        for component in self._applicable(prompt):
            if component.compares:
                for each, score in zip(given, await _compare(component, prompt, responses), strict=True):
                    each.put(component, prompt, score)
        return [each.reward() for each in given]

    def _applicable(self, prompt: Prompt) -> list[Component]:
        return [component for component in self._components if component.applies(prompt.task)]


@dataclass(slots=True)
class _Gathered:
    """A reward while its components come in."""

    components: dict[str, float] = field(default_factory=dict[str, float])
    weights: dict[str, float] = field(default_factory=dict[str, float])
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    def put(self, component: Component, prompt: Prompt, said: Any) -> None:
        """Take what a verifier said. Raises VerifierFailure when it is no finite number."""
        score = said if isinstance(said, Score) else Score(said)
        self._put(component, prompt, component.name, score.value, component.weight)
        for part, value in score.parts.items():
            self._put(component, prompt, f"{component.name}/{part}", value, 0.0)
        if score.notes:
            self.notes[component.name] = dict(score.notes)

    def _put(self, component: Component, prompt: Prompt, name: str, value: Any, weight: float) -> None:
        number = as_score(value)
        if number is None:
            where = "" if name == component.name else f" as {name.removeprefix(f'{component.name}/')!r}"
            what = f"returned {shown(value)}{where}, which is no finite number"
            raise VerifierFailure(component.name, prompt.id, what)
        self.components[name], self.weights[name] = number, weight

    def reward(self) -> Reward:
        return Reward(self.components, self.weights, self.notes)


def _check(component: Component, prompt: Prompt) -> None:
    try:
        component.verifier.check(prompt)
    except RewardError as error:
        raise RewardError(f"reward {component.name!r}: {error.args[0]}", hint=error.hint) from error


async def _score(
    component: Component, prompt: Prompt, response: str, episode_id: str, info: Mapping[str, Any]
) -> float | Score:
    verifier = cast("Verifier", component.verifier)
    try:
        return await verifier.score(await _submission(component, prompt, response, episode_id, info))
    except (Exception, SystemExit) as error:
        raise _failure(component, prompt, error) from error


async def _compare(component: Component, prompt: Prompt, responses: Sequence[Response]) -> Sequence[float | Score]:
    verifier = cast("GroupVerifier", component.verifier)
    try:
        submissions = [await _submission(component, prompt, r.text, r.episode_id, r.info) for r in responses]
        scores = await verifier.compare(submissions)
        if len(scores) != len(submissions):
            raise ValueError(f"it returned {len(scores)} scores for {len(submissions)} answers")
    except (Exception, SystemExit) as error:
        raise _failure(component, prompt, error) from error
    return scores


def _failure(component: Component, prompt: Prompt, error: BaseException) -> VerifierFailure:
    if isinstance(error, VerifierFailure):
        return error
    if isinstance(error, ServiceError):
        return VerifierFailure(component.name, prompt.id, f"was not given: {error}")
    what = error.args[0] if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
    return VerifierFailure(component.name, prompt.id, f"raised {what}")


async def _submission(
    component: Component, prompt: Prompt, response: str, episode_id: str, info: Mapping[str, Any]
) -> Submission:
    text = response.strip() if component.pattern is None else await component.pattern.last(response)
    return Submission(prompt, text, response, episode_id, info)


def _component(config: RewardConfig, means: Means) -> Component:
    name = config.name or config.type
    try:
        verifier = make_verifier(config, means)
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error.args[0]}", hint=error.hint) from error
    return Component(
        name=name,
        weight=config.weight,
        tasks=frozenset(config.tasks),
        pattern=TimedPattern(config.pattern, seconds=EXTRACT_SECONDS) if config.pattern else None,
        verifier=verifier,
    )
