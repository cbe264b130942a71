"""The reward of a response: named components, each with its own pattern, tasks and weight."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sluice.config.rewards import (
    ExactReward,
    GivenReward,
    NumericReward,
    PythonReward,
    RandomReward,
    ReasoningGymReward,
    RewardConfig,
)
from sluice.errors import RewardError
from sluice.nearest import did_you_mean
from sluice.rewards.base import Verifier, VerifierFailure, as_score, shown
from sluice.rewards.exact import ExactVerifier
from sluice.rewards.given import GivenVerifier
from sluice.rewards.numeric import NumericVerifier
from sluice.rewards.python import PythonVerifier
from sluice.rewards.random import RandomVerifier
from sluice.rewards.reasoning_gym import ReasoningGymVerifier
from sluice.types import Prompt, Reward


@dataclass(frozen=True, slots=True)
class Component:
    """One verifier with its place in the reward."""

    name: str
    weight: float
    tasks: frozenset[str]
    pattern: re.Pattern[str] | None
    verifier: Verifier | GivenVerifier

    def applies(self, task: str) -> bool:
        """Whether prompts of this task are scored by it."""
        return not self.tasks or task in self.tasks


class Rubric:
    """Scores responses with every component that applies to the prompt's task.

    Raises:
        RewardError: a component is set up wrongly.
    """

    def __init__(self, configs: Sequence[RewardConfig]) -> None:
        self._components = tuple(_component(config) for config in configs)
        names = [component.name for component in self._components]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RewardError(f"two reward components are called {twice[0]!r}", hint="give each a `name`")

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
            for component in self._components:
                if component.applies(prompt.task):
                    _check(component, prompt)

    async def reward(
        self, prompt: Prompt, response: str, *, episode_id: str, info: Mapping[str, Any] | None = None
    ) -> Reward:
        """Every applicable component's score of `response`, or of what `info` of the episode brings with it.

        Raises:
            VerifierFailure: a component raised, timed out or returned something that is no finite number.
            RewardError: no component applies to the prompt's task.
        """
        applicable = [component for component in self._components if component.applies(prompt.task)]
        if not applicable:
            self.check([prompt.task])
        scores = {
            component.name: await _score(component, prompt, response, episode_id, info or {})
            for component in applicable
        }
        return Reward(scores, {component.name: component.weight for component in applicable})


def _check(component: Component, prompt: Prompt) -> None:
    try:
        component.verifier.check(prompt)
    except RewardError as error:
        raise RewardError(f"reward {component.name!r}: {error.args[0]}", hint=error.hint) from error


async def _score(
    component: Component, prompt: Prompt, response: str, episode_id: str, info: Mapping[str, Any]
) -> float:
    verifier = component.verifier
    try:
        if isinstance(verifier, GivenVerifier):
            value = verifier.pick(info)
        else:
            value = await verifier.score(prompt, extract(component.pattern, response), episode_id=episode_id)
    except (Exception, SystemExit) as error:
        what = error.args[0] if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
        raise VerifierFailure(component.name, prompt.id, f"raised {what}") from error
    score = as_score(value)
    if score is None:
        raise VerifierFailure(component.name, prompt.id, f"returned {shown(value)}, which is no finite number")
    return score


def extract(pattern: re.Pattern[str] | None, response: str) -> str:
    """The answer in `response`, stripped: the pattern's last match, its first group if it has one.

    Without a pattern the whole response; without a match nothing.
    """
    if pattern is None:
        return response.strip()
    matches = deque(pattern.finditer(response), maxlen=1)
    if not matches:
        return ""
    last = matches[0]
    return ((last.group(1) if pattern.groups else last.group()) or "").strip()


def _component(config: RewardConfig) -> Component:
    return Component(
        name=config.name or config.type,
        weight=config.weight,
        tasks=frozenset(config.tasks),
        pattern=re.compile(config.pattern) if config.pattern else None,
        verifier=_verifier(config),
    )


def _verifier(config: RewardConfig) -> Verifier | GivenVerifier:
    match config:
        case ReasoningGymReward():
            return ReasoningGymVerifier(config)
        case ExactReward():
            return ExactVerifier(config)
        case NumericReward():
            return NumericVerifier(config)
        case PythonReward():
            return PythonVerifier(config)
        case RandomReward():
            return RandomVerifier(config)
        case GivenReward():
            return GivenVerifier(config)
