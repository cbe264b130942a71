"""1 when the answer equals the ground truth."""

from __future__ import annotations

from sluice.config.rewards import ExactReward
from sluice.errors import RewardError
from sluice.rewards.base import Submission
from sluice.types import Prompt


class ExactVerifier:
    """Compares text, without surrounding white space."""

    def __init__(self, config: ExactReward) -> None:
        self._fold = config.ignore_case

    def check(self, prompt: Prompt) -> None:
        """A prompt without ground truth would reward an empty answer."""
        if not prompt.answer.strip():
            raise RewardError(
                f"prompt {prompt.id} has no ground truth to compare with",
                hint="fill the source's answer column, or limit this reward with `tasks`",
            )

    async def score(self, submission: Submission) -> float:
        """1 or 0."""
        truth, given = submission.prompt.answer.strip(), submission.text.strip()
        if not truth:
            self.check(submission.prompt)
        return float(truth.casefold() == given.casefold() if self._fold else truth == given)
