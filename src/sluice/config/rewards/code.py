"""A reward that runs the code of an answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sluice.config.pattern import Pattern
from sluice.config.rewards.base import RewardBase
from sluice.config.sandbox import SandboxConfig


class CodeReward(RewardBase):
    """1 when the answer's Python code passes the tests in its prompt's metadata."""

    type: Literal["code"] = "code"
    pattern: Pattern = r"(?s)```(?:python|py)?[ \t]*\n(.*?)```"
    """Finds the code in the response: the last match, first group if it has one. Empty takes the whole response."""
    tests: str = Field(default="tests", min_length=1)
    """Key of the prompt's metadata with the tests: a list of `{"stdin": …, "stdout": …}`, each a run of the program;
    or a list of assertions as strings, run after the code in the same process."""
    partial: bool = False
    """Score the share of tests that pass; else all must."""
    sandbox: SandboxConfig = SandboxConfig()
    """Limits of one run."""
