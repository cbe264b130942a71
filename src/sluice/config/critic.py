"""PPO and its critic, a value model that is trained beside the policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sluice.config.base import Part
from sluice.config.policy_gradient import PolicyGradientConfig
from sluice.config.train import OptimizerConfig
from sluice.types import Normaliser


class CriticConfig(Part):
    """A model of the policy's architecture with a scalar head. It starts from the policy's first weights;
    precision and memory are those of `train`."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule; the schedule counts the critic's own updates."""
    updates: int = Field(default=1, ge=1)
    """Updates of the critic for each of the policy, on the same mini-batch."""
    warmup_batches: int = Field(default=0, ge=0)
    """Batches at the start of the run that train the critic alone."""
    value_clip: float = Field(default=0.2, ge=0)
    """How far from its value at the start of the batch a prediction still counts; 0 does not clip."""


class PPOConfig(PolicyGradientConfig):
    """PPO with a critic: generalised advantage estimation over the sampled tokens (arXiv 1707.06347)."""

    type: Literal["ppo"] = "ppo"
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount from one sampled token to the next."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Decay of the advantage estimator (arXiv 1506.02438); 1 is reward to go less value."""
    length_adaptive: float | None = Field(default=None, gt=0)
    """Replace `gae_lambda` by 1 - 1/(this times the episode's sampled tokens) (VAPO, arXiv 2504.05118: 0.05)."""
    value_lambda: float | None = Field(default=None, ge=0, le=1)
    """Decay of the critic's targets; None takes that of the advantages (VAPO: 1)."""
    normalise: bool = True
    """Normalise advantages to mean 0 and deviation 1 over the sampled tokens of the batch."""
    eps: float = Field(default=1e-8, ge=0)
    """Added to the batch's standard deviation."""
    normaliser: Normaliser = Normaliser.TOKEN
    """What the losses of actor and critic are divided by."""
    critic: CriticConfig = CriticConfig()
    """The value model."""
