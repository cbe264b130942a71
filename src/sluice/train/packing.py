"""Packing: samples end to end in micro-batches of a token budget, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.errors import TrainError
from sluice.types import MicroBatch, Normaliser, TrainBatch, TrainSample, loss_scales


def pack(
    samples: Sequence[TrainSample], *, budget: int, scales: Sequence[NDArray[np.float64]]
) -> tuple[MicroBatch, ...]:
    """First-fit decreasing: longest sample first, each into the first micro-batch with room for it.

    Deterministic: equal lengths keep their order. At most 11/9 · optimum + 6/9 micro-batches (Dósa 2007).
    Inside a micro-batch samples stand from long to short, so that attention can take neighbours together.

    Args:
        samples: samples of one optimizer step; empty ones (no tokens) are refused.
        budget: tokens of one micro-batch.
        scales: loss factors of each sample, float64 `[len(sample)]`, as `loss_scales` returns them.

    Raises:
        TrainError: a sample is longer than the budget, or has no tokens.
    """
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index]))
    if order:
        check_fits(samples[order[0]], budget)
        if not len(samples[order[-1]]):
            raise TrainError(
                f"segment {samples[order[-1]].segment} of episode {samples[order[-1]].episode_id} has no tokens",
                hint="an episode without tokens cannot be trained; give it an outcome that does not count",
            )
    bins: list[list[int]] = []
    free: list[int] = []
    for index in order:
        length = len(samples[index])
        at = next((number for number, room in enumerate(free) if room >= length), len(bins))
        if at == len(bins):
            bins.append([])
            free.append(budget)
        bins[at].append(index)
        free[at] -= length
    return tuple(
        MicroBatch(tuple(samples[i] for i in members), np.concatenate([scales[i] for i in members]))
        for members in bins
    )


def make_batch(
    samples: Sequence[TrainSample], *, budget: int, normaliser: Normaliser, constant: float = 1.0
) -> TrainBatch:
    """The batch of one optimizer step. The normaliser is counted here, once, before any split.

    Args:
        samples: every sample of the step.
        budget: tokens of one micro-batch (`train.micro_batch_tokens`).
        normaliser, constant: what the loss is divided by; see `sluice.types.loss_scales`.

    Raises:
        TrainError: a sample is longer than the budget.
    """
    return TrainBatch(
        pack(samples, budget=budget, scales=loss_scales(samples, normaliser, constant=constant))
    )


def check_fits(sample: TrainSample, budget: int) -> None:
    """Raise TrainError, with the sizes and the key to change, when a sample is longer than the budget."""
    if len(sample) > budget:
        raise TrainError(
            f"segment {sample.segment} of episode {sample.episode_id} has {len(sample)} tokens, more than the "
            f"{budget} of a micro-batch",
            hint=f"set train.micro_batch_tokens to {len(sample)} or more, or lower rollout.sampling.max_new_tokens",
        )


def packing_efficiency(micro_batches: Sequence[MicroBatch], budget: int) -> float:
    """Tokens packed / (micro-batches · budget), the last micro-batch counted by what it holds; 1 when empty.

    A batch that fits into one micro-batch has efficiency 1: nothing of it is wasted.
    """
    if len(micro_batches) <= 1:
        return 1.0
    *full, last = (micro.num_tokens for micro in micro_batches)
    return (sum(full) + last) / (len(full) * budget + last)
