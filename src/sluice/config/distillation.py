"""Distillation: a teacher judges the policy's own tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sluice.config.policy_gradient import PolicyGradientConfig
from sluice.config.teachers import NAME
from sluice.types import Normaliser


class OPDConfig(PolicyGradientConfig):
    """On-policy distillation: reverse KL to a teacher on the policy's own tokens."""

    type: Literal["opd"] = "opd"
    teacher: str = Field(pattern=NAME)
    """Name of one of `teachers`."""
    coefficient: float = Field(default=1.0, gt=0)
    """The advantage of a token is this times (log teacher - log proximal)."""
    reward_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the reward's advantage (that of RLOO), which is added; 0 distils alone, whatever the reward."""
    normaliser: Normaliser = Normaliser.TOKEN
    """What the loss is divided by."""
