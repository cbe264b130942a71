"""Rewards that score an answer on this machine."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sluice.config.data import ImportPath
from sluice.config.pattern import Pattern
from sluice.config.rewards.base import RewardBase


class ReasoningGymReward(RewardBase):
    """The scorer of the prompt's own reasoning-gym task."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    threshold: float | None = None
    """Scores of at least this are 1, others 0. Some scorers give 0.01-0.05 to wrong answers."""


class ExactReward(RewardBase):
    """1 when the answer equals the ground truth."""

    type: Literal["exact"] = "exact"
    ignore_case: bool = False
    """Compare without case."""


class NumericReward(RewardBase):
    """1 when both are numbers and differ by at most the tolerance."""

    type: Literal["numeric"] = "numeric"
    rel_tol: float = Field(default=1e-6, ge=0)
    """Relative tolerance."""
    abs_tol: float = Field(default=1e-9, ge=0)
    """Absolute tolerance."""


class RegexReward(RewardBase):
    """1 when the answer matches a regular expression."""

    type: Literal["regex"] = "regex"
    expect: Pattern
    """What the answer must match. `{answer}` in it stands for the prompt's ground truth, taken literally."""
    match: Literal["full", "search"] = "full"
    """The whole answer, or any part of it."""
    ignore_case: bool = False
    """Match without case."""
    seconds: float = Field(default=1.0, gt=0)
    """CPU time of one match; an expression that takes longer (catastrophic backtracking) is an infra failure."""


class MathReward(RewardBase):
    """1 when math-verify finds the answer equal to the ground truth: numbers, LaTeX, sets, intervals, equations.

    Needs the extra `math`. Without a `pattern` the answer is looked for in the whole response: `\\boxed{}` first.
    """

    type: Literal["math_verify"] = "math_verify"
    seconds: float = Field(default=5.0, gt=0)
    """CPU time of one comparison; an answer on which it does not end in that time is wrong."""
    workers: int = Field(default=2, ge=1)
    """Helper processes; math-verify works in the main thread of a process only."""


class PythonReward(RewardBase):
    """A function of your own: `(prompt, answer) -> float`, plain or async."""

    type: Literal["python"] = "python"
    path: ImportPath
    """The function: `file.py:name` or `module:name`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Extra keyword arguments."""
    seconds: float = Field(default=30.0, gt=0)
    """Deadline of one call of an async function."""


class RandomReward(RewardBase):
    """0 or 1 by a seeded coin: the control that shows what training does without a signal."""

    type: Literal["random"] = "random"
    probability: float = Field(default=0.5, ge=0, le=1)
    """Chance of a 1."""
    seed: int = 0
    """Seed of the coin; the draw depends on the episode's id alone."""


class GivenReward(RewardBase):
    """A number that came with the episode: given over HTTP with the owner's key, by the runner's `verify`
    program, or by a runner of your own in `Episode.info["rewards"]`.

    A bare number, without a name, is called `reward`. What nobody gave makes the episode an infra failure.
    """

    type: Literal["given"] = "given"
    component: str = "reward"
    """Name under which it was given."""
    default: float | None = Field(default=None, allow_inf_nan=False)
    """Taken when nobody gave it and nothing failed; None makes the episode an infra failure."""

    @model_validator(mode="after")
    def _reads_no_text(self) -> Self:
        if self.pattern:
            raise ValueError("a given reward reads no text; leave `pattern` out")
        return self
