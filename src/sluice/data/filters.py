"""Group filters: a reason to drop a complete group, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sluice.config.data import FilterConfig, MinValidFilter, PythonFilter, SpreadFilter
from sluice.errors import ConfigError
from sluice.plugins import load_object, signature_problem
from sluice.types import Group

GroupFilter: TypeAlias = Callable[[Group], str]
"""Empty string: keep. Anything else: drop, for this reason."""


def equal_rewards(min_std: float) -> GroupFilter:
    """Drop a group whose rewards do not differ: its advantages are all zero (DAPO's dynamic sampling)."""

    def judge(group: Group) -> str:
        rewards = group.rewards
        if len(rewards) and rewards.std() >= min_std:
            return ""
        value = f"{rewards.mean():.4g}" if len(rewards) else "none valid"
        return f"equal_rewards: {value}"

    return judge


def too_few_valid(count: int) -> GroupFilter:
    """Drop a group with fewer than `count` valid members."""

    def judge(group: Group) -> str:
        valid = len(group.valid)
        return "" if valid >= count else f"too_few_valid: {valid} of {len(group.members)}"

    return judge


def make_filter(config: FilterConfig) -> GroupFilter:
    """The filter that `config` names. Raises ConfigError when a function cannot be loaded."""
    match config:
        case SpreadFilter(min_std=min_std):
            return equal_rewards(min_std)
        case MinValidFilter(count=count):
            return too_few_valid(count)
        case PythonFilter(path=path):
            function: GroupFilter = load_object(path, expects="a function (Group) -> str")
            problem = signature_problem(function, 1, []) if callable(function) else "it is no function"
            if problem:
                raise ConfigError(f"{path} is no group filter: {problem}", hint="define it as `def NAME(group) -> str`")
            return function
