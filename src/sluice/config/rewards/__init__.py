"""Rewards: named components with weights. A verifier that fails is an infra failure, never a 0."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sluice.config.rewards.base import RewardBase
from sluice.config.rewards.group import GroupRewardBase, PythonGroupReward
from sluice.config.rewards.verifiers import (
    ExactReward,
    GivenReward,
    NumericReward,
    PythonReward,
    RandomReward,
    ReasoningGymReward,
    RegexReward,
)

__all__ = [
    "ExactReward",
    "GivenReward",
    "GroupRewardBase",
    "NumericReward",
    "PythonGroupReward",
    "PythonReward",
    "RandomReward",
    "ReasoningGymReward",
    "RegexReward",
    "RewardBase",
    "RewardConfig",
]

RewardConfig = Annotated[
    ReasoningGymReward
    | ExactReward
    | NumericReward
    | RegexReward
    | PythonReward
    | PythonGroupReward
    | RandomReward
    | GivenReward,
    Field(discriminator="type"),
]
