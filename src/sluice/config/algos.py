"""Algorithms: `type` names the method; its fields are the choices the method leaves open."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sluice.config.base import Part
from sluice.config.data import ImportPath
from sluice.types import Normaliser


class KLConfig(Part):
    """Distance to the reference policy (the weights at the start of the run)."""

    coefficient: float = Field(gt=0)
    """Weight of the penalty."""
    where: Literal["reward", "loss"] = "loss"
    """Subtracted from each token's reward (no gradient), or added to the loss (gradient)."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of KL(policy || reference) from samples (Schulman 2020)."""


class TISConfig(Part):
    """Truncated importance sampling: weigh tokens by min(proximal / behaviour, cap)."""

    cap: float = Field(default=2.0, gt=0)
    """Upper bound of the weight."""


class PolicyGradientConfig(Part):
    """What the policy-gradient methods share."""

    clip_low: float = Field(default=0.2, ge=0)
    """Ratios below 1 - clip_low get no gradient when the advantage is negative."""
    clip_high: float = Field(default=0.2, ge=0)
    """Ratios above 1 + clip_high get no gradient when the advantage is positive."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer updates on one batch, by mini-batches of groups; credit and scores are computed once."""
    kl: KLConfig | None = None
    """Penalty towards the reference; off by default."""
    tis: TISConfig | None = None
    """Correct the difference between engine and trainer; needs the proximal stream."""


class GRPOConfig(PolicyGradientConfig):
    """Group-relative policy optimisation (arXiv 2402.03300)."""

    type: Literal["grpo"] = "grpo"
    normaliser: Normaliser = Normaliser.SEQUENCE
    """What the loss is divided by."""
    std: Literal["population", "sample"] = "population"
    """Which standard deviation divides the advantage."""
    eps: float = Field(default=1e-6, ge=0)
    """Added to it."""


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
    normaliser: Normaliser = Normaliser.SEQUENCE
    """What the loss is divided by."""


class ReinforcePPConfig(PolicyGradientConfig):
    """REINFORCE++: advantages normalised over all tokens of the batch (arXiv 2501.03262)."""

    type: Literal["reinforce_pp"] = "reinforce_pp"
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
    GRPOConfig | DrGRPOConfig | RLOOConfig | ReinforcePPConfig | PythonAlgorithm, Field(discriminator="type")
]
