"""Low-rank adapters in the place of full training."""

from __future__ import annotations

from pydantic import Field

from sluice.config.base import Part


class LoraConfig(Part):
    """Train W + alpha/rank · B·A instead of W (LoRA, arXiv 2106.09685); needs `sluice-rl[lora]`.

    Engines are given merged weights, and checkpoints hold them. Adapters have no dropout, as the engine has none.
    """

    rank: int = Field(default=16, ge=1)
    """Rows of A, columns of B."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's share is alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as `q_proj`; empty is every one but the head."""
