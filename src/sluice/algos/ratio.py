"""Ratios of probabilities that neither overflow nor poison a gradient, and statistics of a segment."""

from __future__ import annotations

import torch
from torch import Tensor

from sluice.types import LossInputs

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are cut to ± this: e^20 = 4.9e8 is far outside every clip, and its products are finite in float32."""


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio, of its shape. Beyond ±20 the value stays and the gradient is 0."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def segment_mean(values: Tensor, inputs: LossInputs) -> Tensor:
    """Mean of `values` `[tokens]` over the trained tokens of each segment, given to all of its tokens, `[tokens]`.

    A segment is never split over micro-batches and its tokens are added in order, so that no split shows. Tokens of
    weight 0 (prompts, tool output, stale ones) neither count nor matter; without a trained token the mean is 0.
    """
    trained = inputs.weight > 0
    total = _per_segment(torch.where(trained, values, 0.0), inputs)
    count = _per_segment(trained, inputs)
    return (total / count.clamp(min=1)).to(values.dtype)[inputs.sequence]


def segment_has(condition: Tensor, inputs: LossInputs) -> Tensor:
    """Whether `condition` `[tokens]` holds for any trained token of the segment, given to all of its tokens."""
    return (_per_segment(condition & (inputs.weight > 0), inputs) > 0)[inputs.sequence]


def _per_segment(values: Tensor, inputs: LossInputs) -> Tensor:
    """Sums by segment in float64, shape `[num_sequences]`."""
    zeros = torch.zeros(inputs.num_sequences, dtype=torch.float64, device=values.device)
    return zeros.index_add(0, inputs.sequence, values.double())
