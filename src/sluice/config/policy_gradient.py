"""What the policy-gradient methods share: the ratio's clip, KL, corrections, the punishment of long answers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sluice.config.base import Part
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

    cap: float = Field(default=2.0, gt=0)
    """Upper bound of the weight."""


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
    weight: float = Field(default=1.0, ge=0)
    """The full punishment; 0 is none."""


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

    @property
    def weighs(self) -> bool:
        """Whether tokens are weighed by proximal / behaviour."""
        return self.tis is not None or (self.icepop is not None and self.icepop.weigh)

    @property
    def weight_cap(self) -> float | None:
        """Upper bound of that weight; None is none."""
        return self.tis.cap if self.tis else None

    @property
    def around_proximal(self) -> bool:
        """Whether the loss's ratio is to proximal. Masks of segments alone leave it at behaviour, where it corrects
        for the engine and for staleness itself."""
        return self.tis is not None or self.icepop is not None

    @property
    def corrects(self) -> bool:
        """Whether any correction is on, so that a proximal policy is needed."""
        return self.around_proximal or self.sequence_mask is not None or self.veto is not None
