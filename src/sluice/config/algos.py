"""Algorithms: `type` names the method; its fields are the choices the method leaves open."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sluice.config.base import Part
from sluice.config.critic import PPOConfig
from sluice.config.data import ImportPath
from sluice.config.distillation import OPDConfig
from sluice.config.policy_gradient import IcePopConfig, OverlongConfig, PolicyGradientConfig
from sluice.types import Normaliser


class GroupConfig(PolicyGradientConfig):
    """Advantages relative to the group, A = (R - mean) / std: GRPO and the methods that change its loss."""

    std: Literal["population", "sample", "none"] = "population"
    """Which standard deviation divides the advantage; `none` divides by nothing."""
    eps: float = Field(default=1e-6, ge=0)
    """Added to it."""


class GRPOConfig(GroupConfig):
    """Group-relative policy optimisation (arXiv 2402.03300)."""

    type: Literal["grpo"] = "grpo"


class DAPOConfig(GroupConfig):
    """DAPO (arXiv 2503.14476): clip higher, token-level loss, soft punishment of overlong answers.

    Its dynamic sampling is the group filter `spread`: add `{type = "spread"}` to `data.filters`.
    """

    type: Literal["dapo"] = "dapo"
    clip_high: float = Field(default=0.28, ge=0)
    """Ratios above 1 + clip_high get no gradient when the advantage is positive."""
    normaliser: Normaliser = Normaliser.TOKEN
    """What the loss is divided by."""
    overlong: OverlongConfig = OverlongConfig()  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen
    """Punish overlong episodes; `weight = 0` does not."""


class GSPOConfig(GroupConfig):
    """Group sequence policy optimisation: one ratio for each segment (arXiv 2507.18071)."""

    type: Literal["gspo"] = "gspo"
    clip_low: float = Field(default=3e-4, ge=0)
    """As for GRPO, but of the segment's ratio, a geometric mean: two orders of magnitude smaller."""
    clip_high: float = Field(default=4e-4, ge=0)
    """As for GRPO, but of the segment's ratio."""


class CISPOConfig(GroupConfig):
    """CISPO: the clipped ratio is a weight, and every token keeps its gradient (MiniMax-M1, arXiv 2506.13585)."""

    type: Literal["cispo"] = "cispo"
    clip_low: float = Field(default=1.0, ge=0)
    """The weight is at least 1 - clip_low; 1 is no lower bound, as published."""
    clip_high: float = Field(default=4.0, ge=0)
    """The weight is at most 1 + clip_high. Not published for MiniMax-M1; 5 in all, as ScaleRL (arXiv 2510.13786)."""
    normaliser: Normaliser = Normaliser.TOKEN
    """What the loss is divided by."""


class IcePopGRPOConfig(GroupConfig):
    """GRPO with IcePop, as GLM-5 trains reasoning (arXiv 2602.15763): no KL, ε 0.2 / 0.28, band [1/2, 2]."""

    type: Literal["icepop"] = "icepop"
    clip_high: float = Field(default=0.28, ge=0)
    """Ratios above 1 + clip_high get no gradient when the advantage is positive."""
    icepop: IcePopConfig = IcePopConfig()  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen
    """The band."""


class DecoupledConfig(GroupConfig):
    """Decoupled PPO (AReaL, arXiv 2505.24298): clip around the proximal policy, weigh by proximal / behaviour."""

    type: Literal["decoupled_ppo"] = "decoupled_ppo"
    normaliser: Normaliser = Normaliser.TOKEN
    """What the loss is divided by."""
    cap: float | None = Field(default=None, gt=0)
    """Upper bound of the weight; None has none. AReaL's cap masks what is above it instead:
    `icepop = {low = 0, high = 5}`."""

    @model_validator(mode="after")
    def _one_weight(self) -> Self:
        if self.tis:
            raise ValueError("decoupled_ppo weighs by proximal / behaviour as tis does: set algorithm.cap instead")
        return self

    @property
    def weighs(self) -> bool:
        return True

    @property
    def weight_cap(self) -> float | None:
        return self.cap

    @property
    def around_proximal(self) -> bool:
        return True


class DISConfig(GroupConfig):
    """Direct double-sided importance sampling: ratio to behaviour, masked on both sides (GLM-5, arXiv 2602.15763)."""

    type: Literal["dis"] = "dis"
    clip_low: float = Field(default=0.3, ge=0)
    """Tokens whose ratio is not above 1 - clip_low are masked, whatever the sign of the advantage. Not published
    for GLM-5; the defaults are the interval (0.7, 6.0) of SAO (arXiv 2607.07508)."""
    clip_high: float = Field(default=5.0, ge=0)
    """Tokens whose ratio is not below 1 + clip_high are masked."""
    stop_gradient: bool = True
    """The ratio is a weight without gradient, as in REINFORCE; false differentiates ratio · log π. Not published."""
    normaliser: Normaliser = Normaliser.TOKEN
    """What the loss is divided by."""

    @model_validator(mode="after")
    def _one_ratio(self) -> Self:
        if self.tis or self.icepop:
            raise ValueError(
                "dis drops the proximal policy: its ratio is to behaviour, so tis and icepop do not go with it"
            )
        return self


class DrGRPOConfig(PolicyGradientConfig):
    """GRPO without division by the deviation and without length bias (arXiv 2503.20783)."""

    type: Literal["dr_grpo"] = "dr_grpo"
    normaliser: Normaliser = Normaliser.CONSTANT
    """What the loss is divided by."""
    constant: float | None = Field(default=None, gt=0)
    """Length that `constant` divides by, in tokens; None takes `rollout.sampling.max_new_tokens`."""


class RLOOConfig(PolicyGradientConfig):
    """REINFORCE with the mean of the other episodes as baseline (arXiv 2402.14740)."""

    type: Literal["rloo"] = "rloo"


class ReinforcePPConfig(PolicyGradientConfig):
    """REINFORCE++: advantages normalised over all tokens of the batch (arXiv 2501.03262)."""

    type: Literal["reinforce_pp"] = "reinforce_pp"
    normaliser: Normaliser = Normaliser.TOKEN
    """What the loss is divided by."""
    eps: float = Field(default=1e-8, ge=0)
    """Added to the batch's standard deviation."""


class ReinforcePPBaselineConfig(PolicyGradientConfig):
    """REINFORCE++-baseline: less the group's mean, then normalised over the batch (arXiv 2501.03262)."""

    type: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"
    normaliser: Normaliser = Normaliser.TOKEN
    """What the loss is divided by."""
    eps: float = Field(default=1e-8, ge=0)
    """Added to the batch's standard deviation."""


class PythonAlgorithm(Part):
    """An algorithm of your own: a class that satisfies `sluice.algos.base.Algorithm`."""

    type: Literal["python"] = "python"
    path: ImportPath
    """The class."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments."""


AlgorithmConfig = Annotated[
    GRPOConfig
    | DAPOConfig
    | GSPOConfig
    | CISPOConfig
    | IcePopGRPOConfig
    | DecoupledConfig
    | DISConfig
    | DrGRPOConfig
    | RLOOConfig
    | ReinforcePPConfig
    | ReinforcePPBaselineConfig
    | OPDConfig
    | PPOConfig
    | PythonAlgorithm,
    Field(discriminator="type"),
]
