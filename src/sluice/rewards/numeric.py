"""1 when answer and ground truth are numbers that agree within a tolerance."""

from __future__ import annotations

import math
import re

from sluice.config.rewards import NumericReward
from sluice.errors import RewardError
from sluice.rewards.base import Submission
from sluice.types import Prompt

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(rf"([+-]?{_DECIMAL})(?:\s*/\s*([+-]?{_DECIMAL}))?")


class NumericVerifier:
    """Compares as float64. Reads `12`, `-1.5`, `1,234`, `2e-3` and fractions such as `3/4`; nothing else."""

    def __init__(self, config: NumericReward) -> None:
        self._rel_tol = config.rel_tol
        self._abs_tol = config.abs_tol

    def check(self, prompt: Prompt) -> None:
        """The ground truth must be a number."""
        if parse_number(prompt.answer) is None:
            raise RewardError(
                f"the ground truth {prompt.answer!r} of prompt {prompt.id} is no number",
                hint="use the reward type 'exact' for text, or limit this reward with `tasks`",
            )

    async def score(self, submission: Submission) -> float:
        """1 or 0; an answer that is no number is wrong."""
        truth = parse_number(submission.prompt.answer)
        if truth is None:
            self.check(submission.prompt)
            return 0.0
        given = parse_number(submission.text)
        if given is None:
            return 0.0
        return float(math.isclose(given, truth, rel_tol=self._rel_tol, abs_tol=self._abs_tol))


def parse_number(text: str) -> float | None:
    """The finite number that `text` is, else None."""
    match = _NUMBER.fullmatch(text.strip().replace("\N{MINUS SIGN}", "-"))
    if match is None:
        return None
    parts = [part.replace(",", "") for part in match.groups() if part is not None]
    if not all(re.match(r"[+-]?\.?[0-9]", part) for part in parts):  # every piece of the pattern is optional
        return None
    above, below = float(parts[0]), float(parts[1]) if len(parts) == 2 else 1.0
    value = above / below if below else math.inf
    return value if math.isfinite(value) else None
