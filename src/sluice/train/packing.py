"""Packing: samples end to end in micro-batches of a token budget, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.errors import TrainError
from sluice.types import MicroBatch, Normaliser, TrainBatch, TrainSample

_MORE_PASSES = 1.25
"""Micro-batches that keeping groups together may cost, as a multiple of those that samples need one by one."""


def assign(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: longest first, each into the first micro-batch with room for it.

    Deterministic: equal lengths keep their order. At most 11/9 · optimum + 6/9 micro-batches (Dósa 2007).

    Args:
        lengths: tokens of each sample, at most `budget` each.
        budget: tokens of one micro-batch.

    Returns:
        Indices into `lengths` of each micro-batch, in their given order.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = next((number for number, free in enumerate(room) if free >= lengths[index]), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(budget)
        bins[at].append(index)
        room[at] -= lengths[index]
    return [sorted(members) for members in bins]


def assign_groups(samples: Sequence[TrainSample], budget: int) -> list[list[int]]:
    """`assign`, with the samples of a group in one micro-batch where they fit: their common tokens are computed once.

    A group with more tokens than the budget is split by `assign`. Where whole groups would need over a quarter more
    micro-batches, or two where one is enough, samples are assigned one by one.

    Args:
        samples: with at most `budget` tokens each.
        budget: tokens of one micro-batch.

    Returns:
        Indices into `samples` of each micro-batch, in their given order.
    """
    lengths = [len(sample) for sample in samples]
    one_by_one = assign(lengths, budget)
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group_id, []).append(index)
    blocks = [
        [members[place] for place in places]
        for members in groups.values()
        for places in assign([lengths[index] for index in members], budget)
    ]
    together = assign([sum(lengths[index] for index in block) for block in blocks], budget)
    if len(together) > _MORE_PASSES * len(one_by_one):
        return one_by_one
    return [sorted(index for number in places for index in blocks[number]) for places in together]


def spread(
    lengths: Sequence[int], ranks: int, budget: int, *, alone: bool = False, multiple: int = 1
) -> list[list[list[int]]]:
    """Share samples out so that every rank makes as many passes as any other, of about as many tokens each.

    Longest first, each into the pass with the fewest tokens (Graham's LPT rule: at most 4/3 of the optimum when no
    budget intervenes); one more pass (or `multiple` more) a rank when a
    sample finds no room.

    Args:
        lengths: tokens of each sample, at most `budget` each.
        ranks: who shares.
        budget: tokens of one pass.
        alone: a pass holds one sample at most. The k longest then meet in the first pass, the longest at the rank
            with the fewest tokens so far, and so on.
        multiple: every rank makes a multiple of this many passes.

    Returns:
        By rank, then by pass, indices into `lengths` in their given order. Passes may be empty.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if alone:
        shares = _one_each(lengths, longest_first, ranks)
        return [[*share, *([] for _ in range(-len(share) % multiple))] for share in shares]
    passes = -(-max(1, -(-sum(lengths) // (budget * ranks))) // multiple) * multiple
    while True:
        bins: list[list[int]] = [[] for _ in range(ranks * passes)]
        loads = [0] * len(bins)
        for index in longest_first:
            at = min(range(len(bins)), key=loads.__getitem__)
            if loads[at] + lengths[index] > budget:
                break
            bins[at].append(index)
            loads[at] += lengths[index]
        else:
            return [[sorted(bins[rank + ranks * number]) for number in range(passes)] for rank in range(ranks)]
        passes += multiple


def _one_each(lengths: Sequence[int], longest_first: Sequence[int], ranks: int) -> list[list[list[int]]]:
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    for start in range(0, len(lengths), ranks):
        emptiest = sorted(shares, key=lambda share: sum(lengths[index] for members in share for index in members))
        for number, share in enumerate(emptiest):
            share.append(list(longest_first[start + number : start + number + 1]))
    return shares if lengths else [[[]] for _ in range(ranks)]


def pack(
    samples: Sequence[TrainSample], *, budget: int, scales: Sequence[NDArray[np.float64]]
) -> tuple[MicroBatch, ...]:
    """Micro-batches of at most `budget` tokens, without padding; see `assign_groups` for the order.

    Samples whose advantages are all 0 are packed apart: when the loss is flat there, as a policy gradient is, the
    trainer leaves out the backward passes of their micro-batches (see `train.totals.send_back`).

    Args:
        samples: samples of one optimizer step.
        budget: tokens of one micro-batch.
        scales: loss factors of each sample, float64 `[len(sample)]`, as `loss_scales` returns them.

    Raises:
        TrainError: a sample is longer than the budget, or has no tokens.
    """
    check_fit(samples, budget)
    flat = ["advantage" in sample.streams and not sample["advantage"].any() for sample in samples]
    packed: list[MicroBatch] = []
    for kind in (True, False):
        chosen = [index for index in range(len(samples)) if flat[index] is kind]
        for places in assign_groups([samples[index] for index in chosen], budget):
            members = [chosen[place] for place in places]
            scale = np.concatenate([scales[index] for index in members])
            packed.append(MicroBatch(tuple(samples[index] for index in members), scale))
    return tuple(packed)


def loss_scales(
    samples: Sequence[TrainSample], normaliser: Normaliser, *, constant: float = 1.0
) -> list[NDArray[np.float64]]:
    """Per-token factors such that the step's loss is Σ factor · token loss, however samples are split.

    Args:
        samples: every sample of the optimizer step.
        normaliser: see `Normaliser`.
        constant: length that `Normaliser.CONSTANT` divides by, in tokens.

    Returns:
        One float64 array of shape `[len(sample)]` each; all zero when nothing is trained.
    """
    counts = [sample.num_trained_tokens for sample in samples]
    num_segments = sum(count > 0 for count in counts)
    if normaliser is Normaliser.TOKEN:
        divisors = [float(sum(counts))] * len(samples)
    elif normaliser is Normaliser.SEQUENCE:
        divisors = [float(count * num_segments) for count in counts]
    elif normaliser is Normaliser.EPISODE:
        per_episode: dict[str, int] = {}
        for sample, count in zip(samples, counts, strict=True):
            per_episode[sample.episode_id] = per_episode.get(sample.episode_id, 0) + count
        num_episodes = sum(count > 0 for count in per_episode.values())
        divisors = [float(per_episode[sample.episode_id] * num_episodes) for sample in samples]
    else:
        divisors = [constant * num_segments] * len(samples)
    return [
        np.asarray(sample["weight"], dtype=np.float64) / divisor if divisor else np.zeros(len(sample))
        for sample, divisor in zip(samples, divisors, strict=True)
    ]


def make_batch(
    samples: Sequence[TrainSample], *, budget: int, normaliser: Normaliser, constant: float = 1.0
) -> TrainBatch:
    """The batch of one optimizer step. The normaliser is counted here, once, before any split.

    Args:
        samples: every sample of the step.
        budget: tokens of one micro-batch (`train.micro_batch_tokens`).
        normaliser, constant: what the loss is divided by; see `loss_scales`.

    Raises:
        TrainError: a sample is longer than the budget.
    """
    return TrainBatch(pack(samples, budget=budget, scales=loss_scales(samples, normaliser, constant=constant)))


def split_over(
    batch: TrainBatch, ranks: int, budget: int, *, alone: bool = False, multiple: int = 1
) -> list[tuple[MicroBatch, ...]]:
    """The batch's samples packed anew for each rank, with the loss factors they have; see `spread`."""
    samples, scales = list(batch.samples), list[NDArray[np.float64]]()
    for micro in batch.micro_batches:
        scales += np.split(micro.scales, micro.cu_seqlens[1:-1])
    shares = spread([len(sample) for sample in samples], ranks, budget, alone=alone, multiple=multiple)
    return [
        tuple(
            MicroBatch(
                tuple(samples[index] for index in members),
                np.concatenate([np.zeros(0), *(scales[index] for index in members)]),
            )
            for members in share
        )
        for share in shares
    ]


def check_fit(samples: Sequence[TrainSample], budget: int) -> None:
    """Raise TrainError for the first sample that is longer than the budget or has no tokens."""
    for sample in samples:
        name = f"segment {sample.segment} of episode {sample.episode_id}"
        if len(sample) > budget:
            raise TrainError(
                f"{name} has {len(sample)} tokens, more than the {budget} of a micro-batch",
                hint=f"set train.micro_batch_tokens to {len(sample)} or more, or lower rollout.sampling.max_new_tokens",
            )
        if len(sample) == 0:
            raise TrainError(
                f"{name} has no tokens",
                hint="an episode without tokens cannot be trained; give it an outcome that does not count",
            )


def packing_efficiency(micro_batches: Sequence[MicroBatch], budget: int) -> float:
    """Tokens packed / (micro-batches · budget), the last micro-batch counted by what it holds; 1 when empty.

    A batch that fits into one micro-batch has efficiency 1: nothing of it is wasted.
    """
    if len(micro_batches) <= 1:
        return 1.0
    *full, last = (micro.num_tokens for micro in micro_batches)
    return (sum(full) + last) / (len(full) * budget + last)
