"""Learning-rate schedules: a pure function of the step, so that resume needs no state."""

from __future__ import annotations

import math

from sluice.config.train import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step`, counted from 0.

    Warm-up: lr · (step + 1) / warmup_steps, so that step `warmup_steps - 1` runs at the peak. Afterwards p goes
    from 0 at the first step after the warm-up to 1 at the last of `total_steps` (and stays 1), and with
    f = final_lr_ratio: constant lr; linear lr · (1 - (1 - f) p); cosine lr · (f + (1 - f) (1 + cos πp) / 2).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(total_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    fall = progress if config.schedule == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0
    return config.lr * (1.0 - (1.0 - config.final_lr_ratio) * fall)
