"""Algorithms: `type` names the method; its fields are the choices the method leaves open."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sluice.config.base import Part
from sluice.config.data import ImportPath
from sluice.types import Normaliser


class KLConfig(Part):
    """Distance to the reference policy (the weights at the start of the run)."""

    coefficient: float = Field(gt=0)
    """Weight of the penalty."""
    where: Literal["reward", "loss"] = "loss"
    """`reward`: subtracted from each token's reward, at the proximal policy, without gradient; credit carries it.
    `loss`: added to the loss at the current policy, with the estimator's gradient."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of KL(policy || reference) from samples (Schulman 2020). In the loss their gradients differ, see
    `sluice.algos.kl`: k2 follows KL(policy || reference), k3 KL(reference || policy), k1 nothing on average."""


class TISConfig(Part):
    """Truncated importance sampling: weigh tokens by min(proximal / behaviour, cap), without gradient."""

    cap: float | None = Field(default=2.0, gt=0)
    """Upper bound of the weight; None weighs by the ratio as it is."""


class Band(Part):
    """Bounds of a ratio; a subclass gives them defaults."""

    low: float
    high: float

    @model_validator(mode="after")
    def _low_below_high(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}: everything would be masked")
        return self


class IcePopConfig(Band):
    """Mask the tokens whose proximal / behaviour lies outside [low, high] (Ring-1T, arXiv 2510.18855)."""

    low: float = Field(default=0.5, ge=0)
    """Lower bound; GLM-5 takes 1/2, Ring-1T 0.5."""
    high: float = Field(default=2.0, gt=0)
    """Upper bound; GLM-5 takes 2, Ring-1T 5."""
    weigh: bool = True
    """Weigh the tokens that are kept by the ratio, as published; false only masks."""


class SequenceMaskConfig(Band):
    """Mask a whole segment when the geometric mean of its tokens' proximal / behaviour is outside [low, high]."""

    low: float = Field(default=0.99, ge=0)
    """Lower bound."""
    high: float = Field(default=1.01, gt=0)
    """Upper bound."""


class VetoConfig(Band):
    """Mask a whole segment when proximal / behaviour of any one of its tokens is outside [low, high]."""

    low: float = Field(default=1e-4, ge=0)
    """Lower bound."""
    high: float = Field(default=1e4, gt=0)
    """Upper bound."""


class OverlongConfig(Part):
    """Soft punishment of overlong answers (DAPO, arXiv 2503.14476 eq. 13), subtracted from the return.

    Nothing up to `max_tokens - buffer` sampled tokens, then linear, `weight` from `max_tokens` on. Group filters
    and logged rewards do not see it.
    """

    max_tokens: int | None = Field(default=None, ge=1)
    """Sampled tokens of an episode at which the punishment is full. None takes
    `rollout.sampling.max_new_tokens`, which limits one turn: set it where episodes have several."""
    buffer: int | None = Field(default=None, ge=1)
    """Tokens over which it grows; None takes a fifth of `max_tokens`, the published 4,096 of 20,480."""
    weight: float = Field(default=1.0, gt=0)
    """The full punishment."""


class PolicyGradientConfig(Part):
    """What the policy-gradient methods share: the ratio's clip, and corrections that combine freely.

    `tis`, `icepop`, `sequence_mask` and `veto` judge proximal / behaviour. What they mask has no loss and no
    gradient, its KL included, but was counted when the loss was normalised.
    """

    clip_low: float = Field(default=0.2, ge=0)
    """Ratios below 1 - clip_low get no gradient when the advantage is negative."""
    clip_high: float = Field(default=0.2, ge=0)
    """Ratios above 1 + clip_high get no gradient when the advantage is positive."""
    normaliser: Normaliser = Normaliser.SEQUENCE
    """What the loss is divided by."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer updates on one batch, by mini-batches of groups; credit and scores are computed once."""
    kl: KLConfig | None = None
    """Penalty towards the reference; off by default."""
    overlong: OverlongConfig | None = None
    """Punish overlong episodes; off by default."""
    proximal: Literal["scored", "current", "interpolated"] = "scored"
    """What corrections take for the proximal policy. `scored`: a forward pass before the batch. `current`: each
    update's own weights, without gradient and without a pass; the same thing while updates_per_batch = 1.
    `interpolated`: behaviour + lag / (lag + 1) · (current - behaviour) in log space, without a pass
    (arXiv 2512.06547)."""
    tis: TISConfig | None = None
    """Correct the difference between engine and trainer by a truncated weight."""
    icepop: IcePopConfig | None = None
    """Mask tokens that engine and trainer disagree about."""
    sequence_mask: SequenceMaskConfig | None = None
    """Mask segments that have drifted on average."""
    veto: VetoConfig | None = None
    """Mask segments that hold an extreme token."""


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
    overlong: OverlongConfig | None = OverlongConfig()
    """Punish overlong episodes; None does not."""


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
    icepop: IcePopConfig | None = IcePopConfig()
    """The band; None leaves plain GRPO."""


class DecoupledConfig(GroupConfig):
    """Decoupled PPO (AReaL, arXiv 2505.24298): clip around the proximal policy, weigh by proximal / behaviour.

    AReaL's cap masks what is above it: `icepop = {low = 0, high = 5}`. `tis.cap` truncates instead.
    """

    type: Literal["decoupled_ppo"] = "decoupled_ppo"
    normaliser: Normaliser = Normaliser.TOKEN
    """What the loss is divided by."""
    tis: TISConfig | None = TISConfig(cap=None)
    """The weight proximal / behaviour, as it is by default; None leaves it to `icepop`."""


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
    | PythonAlgorithm,
    Field(discriminator="type"),
]
