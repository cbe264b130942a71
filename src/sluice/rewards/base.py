"""What a verifier is, and what becomes of one that fails."""

from __future__ import annotations

import math
import numbers
from typing import Any, Protocol

import numpy as np

from sluice.errors import RewardError
from sluice.types import Prompt


class VerifierFailure(RewardError):  # noqa: N818  an outcome, by its name
    """A verifier raised, timed out or returned no finite number: an `infra_failure`, never a reward of 0.

    Attributes:
        component: name of the reward component.
        prompt_id: the prompt whose answer was scored.
    """

    def __init__(self, component: str, prompt_id: str, what: str) -> None:
        super().__init__(f"reward {component!r} of prompt {prompt_id} {what}")
        self.component = component
        self.prompt_id = prompt_id


class Verifier(Protocol):
    """Scores one answer."""

    def check(self, prompt: Prompt) -> None:
        """Raise RewardError when no answer to this prompt can be scored: its ground truth is unfit."""
        ...

    async def score(self, prompt: Prompt, answer: str, *, episode_id: str) -> float:
        """The score of `answer`. May raise anything: the rubric turns it into a VerifierFailure."""
        ...


def as_score(value: Any) -> float | None:
    """`value` as a finite float; a bool is 0 or 1. None for anything that is no score."""
    if isinstance(value, bool | np.bool_):
        return float(value)
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer or fraction beyond float64
        return None
    return number if math.isfinite(number) else None


def shown(value: Any, limit: int = 80) -> str:
    """`value` for an error message: its type and a short repr."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= limit else text[:limit] + '…'}"
