"""Rewards that compare the members of a group with each other."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sluice.config.data import ImportPath
from sluice.config.rewards.base import RewardBase


class GroupRewardBase(RewardBase):
    """A component that sees all answers of a group at once, when the last of them is finished."""


class PythonGroupReward(GroupRewardBase):
    """A function of your own that compares: `(prompt, answers) -> list of floats`, plain or async."""

    type: Literal["python_group"] = "python_group"
    path: ImportPath
    """The function: `file.py:name` or `module:name`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Extra keyword arguments."""
    seconds: float = Field(default=30.0, gt=0)
    """Deadline of one call of an async function."""
