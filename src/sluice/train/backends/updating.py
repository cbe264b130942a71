"""One update of a model in this process, the policy's and the critic's alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from sluice.train.backends.optimizer import MasterOptimizer
from sluice.train.base import StepStats
from sluice.train.totals import StepTotals


def take_step(optimizer: MasterOptimizer, backward: Callable[[], StepTotals]) -> StepStats:
    """Add up gradients, clip, update.

    Args:
        optimizer: of the model.
        backward: forward and backward of every micro-batch of the step.

    Raises:
        TrainError: the gradient is not finite; it names where that began, and nothing was updated.
    """
    optimizer.zero_grad()
    totals = backward()
    norm = optimizer.grad_norm()
    grad_norm = float(norm)
    if not np.isfinite(grad_norm):
        optimizer.zero_grad()
        raise totals.not_finite()
    rate = optimizer.update(norm)
    optimizer.zero_grad()
    return totals.stats(grad_norm=grad_norm, lr=rate)


def step_gradients(optimizer: MasterOptimizer, backward: Callable[[], StepTotals]) -> dict[str, Tensor]:
    """The gradient of a step by parameter name, before clipping; nothing is updated."""
    optimizer.zero_grad()
    backward()
    gradients = {name: gradient.clone() for name, gradient in optimizer.gradients().items()}
    optimizer.zero_grad()
    return gradients
