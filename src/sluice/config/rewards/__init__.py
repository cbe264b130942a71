"""Rewards: named components with weights. A verifier that fails is an infra failure, never a 0."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sluice.config.rewards.base import RewardBase
from sluice.config.rewards.code import CodeReward
from sluice.config.rewards.group import GroupRewardBase, PythonGroupReward
from sluice.config.rewards.remote import (
    HttpReward,
    JudgeGroupReward,
    JudgeReward,
    JudgeRewardBase,
    RemoteRewardBase,
)
from sluice.config.rewards.verifiers import (
    ExactReward,
    GivenReward,
    MathReward,
    NumericReward,
    PythonReward,
    RandomReward,
    ReasoningGymReward,
    RegexReward,
)

__all__ = [
    "CodeReward",
    "ExactReward",
    "GivenReward",
    "GroupRewardBase",
    "HttpReward",
    "JudgeGroupReward",
    "JudgeReward",
    "JudgeRewardBase",
    "MathReward",
    "NumericReward",
    "PythonGroupReward",
    "PythonReward",
    "RandomReward",
    "ReasoningGymReward",
    "RegexReward",
    "RemoteRewardBase",
    "RewardBase",
    "RewardConfig",
]

RewardConfig = Annotated[
    ReasoningGymReward
    | ExactReward
    | NumericReward
    | RegexReward
    | MathReward
    | CodeReward
    | PythonReward
    | PythonGroupReward
    | HttpReward
    | JudgeReward
    | JudgeGroupReward
    | RandomReward
    | GivenReward,
    Field(discriminator="type"),
]
