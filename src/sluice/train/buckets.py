"""Which samples of a pack are attended together, and how their tokens get there and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FREE_PADDING = 1_024
"""Padded tokens of a bucket below which one more kernel call would cost more than the padding does."""
_PADDING_SHARE = 0.25
"""Padded tokens of a bucket, as a share of its real ones, that are always accepted."""
LONG = 4_096
"""Tokens of a sample from which on cuDNN's kernel pays; measured on an H200, causal, heads of 128: 451 TFLOP/s forward
and 409 backward at this length, 602 and 520 at 65,536, where FlashAttention 2 has 285 and 245 at any."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Samples of similar length that are attended together: how many, and slots for the tokens of each."""

    count: int
    longest: int

    @property
    def slots(self) -> int:
        return self.count * self.longest


class Moves(NamedTuple):
    """How rows of a pack move to the padded slots of its buckets, and back. Without shared rows, a row is a token.

    Attributes:
        gather: row of each slot, int64 `[slots]`; padding repeats the last token of its sample.
        scatter: slot of each row, int64 `[rows]`.
        real: True at slots whose output is that of a row, `[slots, 1]`.
        again: the other slots that hold a token, int64 `[again]`; None where no row is shared.
    """

    gather: Tensor
    scatter: Tensor
    real: Tensor
    again: Tensor | None = None


class Sharing(NamedTuple):
    """Which tokens a model computes for all of them.

    Attributes:
        tokens: token of each row, int64 `[rows]`.
        row: row of each token, int64 `[tokens]`.
    """

    tokens: Tensor
    row: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackLayout:
    """Where the samples of a pack lie. Handed to the model as the keyword `pack`; built once per pack.

    `moves` is None when all samples are equally long and share nothing: they already are one bucket without padding.
    `lengths` are in the order of the samples. `sharing` is None where every token is computed.
    """

    lengths: tuple[int, ...]

    buckets: tuple[Bucket, ...]
    moves: Moves | None
    longest: int
    sharing: Sharing | None = None


def layout(
    lengths: Sequence[int],
    device: torch.device,
    copies: NDArray[np.int64] | None = None,
    *,
    rounded: bool | None = None,
) -> PackLayout:
    """The layout of samples that stand end to end, each of at least one token, in any order.

    Samples are taken from long to short; a bucket grows until its padding exceeds both a quarter of its
    tokens and 1,024 tokens.

    Args:
        lengths: tokens of each sample.
        device: where the indices go.
        copies: the token that each token is a copy of, as `first_copies` returns it; None computes all.
        rounded: pad long samples to lengths that come again; None does so on an accelerator.
    """
    if rounded is None:
        rounded = device.type != "cpu"
    sized = _rounded if rounded else int
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    tokens = 0
    for index in order:
        tokens += lengths[index]
        slots = sized(lengths[groups[-1][0]]) * (len(groups[-1]) + 1) if groups else 0
        if not groups or slots - tokens > max(_FREE_PADDING, _PADDING_SHARE * tokens):
            groups.append([])
            tokens = lengths[index]
        groups[-1].append(index)
    buckets = tuple(Bucket(len(group), sized(lengths[group[0]])) for group in groups)
    longest = max(lengths, default=0)
    if copies is None:
        if sum(bucket.slots for bucket in buckets) == sum(lengths) and len(buckets) <= 1:
            return PackLayout(tuple(lengths), buckets, None, longest)
        return PackLayout(tuple(lengths), buckets, _moves(lengths, groups, buckets, device), longest)
    own = copies == np.arange(len(copies))
    row = (np.cumsum(own) - 1)[copies]
    sharing = Sharing(torch.from_numpy(np.flatnonzero(own)).to(device), torch.from_numpy(row).to(device))
    moves = _share(_moves(lengths, groups, buckets, device), sharing)
    return PackLayout(tuple(lengths), buckets, moves, longest, sharing)


def _rounded(length: int) -> int:
    """Slots for a sample of `length` tokens: the next of sixteen lengths in its octave where it is long."""
    step = 1 << max(length.bit_length() - 5, 0)
    return -(-length // step) * step if length >= LONG else length


def _share(moves: Moves, sharing: Sharing) -> Moves:
    """Moves of rows, from those of all tokens."""
    scatter = moves.scatter.index_select(0, sharing.tokens)
    real = torch.zeros_like(moves.real)
    real[scatter] = True
    again = torch.nonzero(moves.real & ~real)[:, 0]
    return Moves(sharing.row.index_select(0, moves.gather), scatter, real, again)


def _moves(
    lengths: Sequence[int], groups: Sequence[Sequence[int]], buckets: Sequence[Bucket], device: torch.device
) -> Moves:
    counts = np.asarray(lengths, dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    gathers: list[np.ndarray] = []
    reals: list[np.ndarray] = []
    for group, bucket in zip(groups, buckets, strict=True):
        slot = np.arange(bucket.longest)
        held = counts[list(group), None]
        gathers.append((first[list(group), None] + np.minimum(slot, held - 1)).reshape(-1))
        reals.append((slot < held).reshape(-1))
    gather, real = np.concatenate(gathers), np.concatenate(reals)
    scatter = np.empty(int(counts.sum()), dtype=np.int64)
    scatter[gather[real]] = np.flatnonzero(real)
    return Moves(
        torch.from_numpy(gather).to(device),
        torch.from_numpy(scatter).to(device),
        torch.from_numpy(real).to(device).unsqueeze(1),
    )
