"""1 when the answer matches a regular expression."""

from __future__ import annotations

import re
from functools import lru_cache

from sluice.config.rewards import RegexReward
from sluice.errors import RewardError
from sluice.rewards.base import Submission
from sluice.rewards.pattern import TimedPattern
from sluice.types import Prompt

ANSWER = "{answer}"
"""In an expression: the ground truth, escaped."""


class RegexVerifier:
    """Matches the answer; the ground truth may stand in the expression."""

    def __init__(self, config: RegexReward) -> None:
        self._expect = config.expect
        self._full = config.match == "full"
        self._compile = lru_cache(maxsize=4096)(
            lambda text: TimedPattern(text, seconds=config.seconds, ignore_case=config.ignore_case)
        )

    def check(self, prompt: Prompt) -> None:
        """An expression with `{answer}` needs a ground truth: an empty one would match almost anything."""
        if ANSWER in self._expect and not prompt.answer.strip():
            raise RewardError(
                f"prompt {prompt.id} has no ground truth to put in place of {ANSWER}",
                hint="fill the source's answer column, or limit this reward with `tasks`",
            )

    async def score(self, submission: Submission) -> float:
        """1 or 0."""
        self.check(submission.prompt)
        truth = re.escape(submission.prompt.answer.strip())
        pattern = self._compile(self._expect.replace(ANSWER, truth))
        return float(await (pattern.fullmatch if self._full else pattern.search)(submission.text))
