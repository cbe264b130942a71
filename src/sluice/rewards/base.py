"""What a verifier is, what it is shown and says, and what becomes of one that fails."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class Submission:
    """One episode as a verifier sees it.

    Attributes:
        text: the answer: what the component's pattern found in the response.
        response: the last turn that the policy wrote.
        info: of the episode.
    """

    prompt: Prompt
    text: str
    response: str
    episode_id: str
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Score:
    """What a verifier says when a bare number is not all.

    Attributes:
        value: the component's score.
        parts: further measures by name, logged as components of weight 0 called `component/part`.
        notes: kept beside the reward in the log: what a judge said, why a test failed. Plain values.
    """

    value: Any
    parts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Verifier(Protocol):
    """Scores one answer."""

    def check(self, prompt: Prompt) -> None:
        """Raise RewardError when no answer to this prompt can be scored: its ground truth is unfit."""
        ...

    async def score(self, submission: Submission) -> float | Score:
        """The score of an answer. May raise anything: the rubric turns it into a VerifierFailure."""
        ...


class GroupVerifier(Protocol):
    """Scores the answers of a group against each other."""

    def check(self, prompt: Prompt) -> None:
        """Raise RewardError when no answers to this prompt can be compared."""
        ...

    async def compare(self, submissions: Sequence[Submission]) -> Sequence[float | Score]:
        """One score for each answer, in order. All answer the same prompt; failed members are not among them.

        May raise anything: the rubric turns it into a VerifierFailure.
        """
        ...


class CodeRan(Protocol):
    """A program that has ended in a sandbox."""

    @property
    def ending(self) -> str:
        """`exited`, `timeout` or `limit`."""
        ...

    @property
    def code(self) -> int | None:
        """Exit code, minus the signal; None when it was ended from outside."""
        ...

    @property
    def limit(self) -> str:
        """Which limit it met; empty when none."""
        ...

    @property
    def stdout(self) -> str: ...

    @property
    def stderr(self) -> str: ...


class CodeRunner(Protocol):
    """Runs code that nobody has read."""

    @property
    def exposed(self) -> str:
        """What of this machine a program can reach, in words; empty when nothing."""
        ...

    async def run(self, program: str, *, stdin: str = "") -> CodeRan:
        """Run a Python program to its end. Raises SandboxError when the sandbox failed, not the program."""
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
