"""The scorer of the prompt's own reasoning-gym task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from sluice import gym
from sluice.config.rewards import ReasoningGymReward
from sluice.errors import ConfigError, RewardError
from sluice.rewards.base import Submission
from sluice.rewards.screen import is_harmless
from sluice.types import Prompt


class ReasoningGymVerifier:
    """Scores with `score_answer` of the dataset, parameters and entry in the prompt's metadata.

    Everything it needs is in the prompt, so that a prompt read back from the log is scored the same.
    """

    def __init__(self, config: ReasoningGymReward) -> None:
        self._threshold = config.threshold

    def check(self, prompt: Prompt) -> None:
        """The prompt must come from reasoning-gym, and from a dataset that is installed here."""
        self._scorer(prompt)

    async def score(self, submission: Submission) -> float:
        """The dataset's score, or 0 and 1 by the threshold."""
        prompt, answer = submission.prompt, submission.text
        score_answer, entry = self._scorer(prompt)
        seen = answer if is_harmless(prompt.metadata[gym.KEY]["dataset"], answer, entry) else ""
        try:
            score = score_answer(seen, entry)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # Some scorers raise on an answer they cannot parse. If this one can score its own ground truth,
            # then it works and the answer is unreadable: a wrong one. If not, its failure goes up.
            score_answer(entry["answer"] or "", entry)
            score = 0.0
        if self._threshold is None:
            return score
        return float(score >= self._threshold)

    def _scorer(self, prompt: Prompt) -> tuple[Callable[[str, dict[str, Any]], float], dict[str, Any]]:
        found = prompt.metadata.get(gym.KEY)
        if not isinstance(found, Mapping) or not {"dataset", "entry"} <= found.keys():
            raise RewardError(
                f"prompt {prompt.id} of task {prompt.task!r} does not come from reasoning-gym: its "
                f"metadata has no {gym.KEY!r} with dataset and entry",
                hint="use another reward type for this task, or limit this one with `tasks`",
            )
        held = cast("Mapping[str, Any]", found)
        try:
            score_answer = gym.scorer(str(held["dataset"]), held.get("params", {}))
        except ConfigError as error:
            raise RewardError(f"prompt {prompt.id}: {error.args[0]}", hint=error.hint) from error
        return score_answer, gym.decode(held["entry"])
