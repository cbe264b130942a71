"""A micro-batch as this rank sees it: padded for context and sequence parallelism, and cut to the rank's tokens.

With context parallelism over c ranks every sample is padded to a multiple of 2c tokens and cut into 2c chunks, of
which rank r has chunks r and 2c - 1 - r: then every rank attends to as many keys as any other. With sequence
parallelism a last sample of padding makes the tokens divisible by the tensor-parallel ranks. Padding is on the right
and nothing attends to it but itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from sluice.train.backends.megatron.rotary import Angles
from sluice.train.buckets import PackLayout, layout
from sluice.train.packed_model import predicted_tokens
from sluice.types import MicroBatch


class Grid(NamedTuple):
    """How many ranks a pack is divided over, and which of them this is.

    Attributes:
        cp, cp_rank: context-parallel ranks.
        tokens_by, tokens_rank: those that divide the tokens of a context-parallel rank between matrices: with sequence
            parallelism the tensor-parallel ranks, else one.
    """

    cp: int = 1
    cp_rank: int = 0
    tokens_by: int = 1
    tokens_rank: int = 0


@dataclass
class Packed(PackedSeqParams):
    """What travels with the hidden states through the model; see `make_packed`.

    Attributes:
        ids: of this rank, int64 `[1, local]`.
        still: where the embedding gets no gradient, bool `[local / tokens_by, 1, 1]`; None for nowhere.
        cos, sin: of its positions, `[local, 1, rotary_dim]`.
        lengths: of all samples of the pack, padded ones; the tokens of the pack are their sum.
        layout: where the samples lie, without context parallelism.
        across: how they are attended to with it.
        rows: local rows from which this rank's scored tokens are predicted, int64 `[mine]`.
        targets: these tokens, int64 `[mine]`; `temperature`: theirs, float32 `[mine]`.
        counts: scored tokens of each context-parallel rank.
        order: for each scored token of the micro-batch its place among those of all ranks, rank after rank, each padded
            to the most that one has; int64 `[scored]`.
        index: the scored tokens in the micro-batch, int64 `[scored]`.
    """

    ids: Tensor = None  # pyright: ignore[reportAssignmentType]  (the base class has defaults)
    still: Tensor | None = None
    cos: Tensor = None  # pyright: ignore[reportAssignmentType]
    sin: Tensor = None  # pyright: ignore[reportAssignmentType]
    lengths: tuple[int, ...] = ()
    layout: PackLayout | None = None
    across: Across | None = None
    rows: Tensor = None  # pyright: ignore[reportAssignmentType]
    targets: Tensor = None  # pyright: ignore[reportAssignmentType]
    temperature: Tensor = None  # pyright: ignore[reportAssignmentType]
    counts: tuple[int, ...] = ()
    order: Tensor = None  # pyright: ignore[reportAssignmentType]
    index: Tensor = None  # pyright: ignore[reportAssignmentType]


class Across(NamedTuple):
    """How this rank's two chunks of each sample meet the keys of all context-parallel ranks.

    Attributes:
        back: gathered tokens in the order of the pack, int64 `[tokens]`.
        spans: of each chunk, in order: its queries, and from where to where its keys stand in the pack.
        keys: the keys of all chunks end to end, int64 `[keys]`.
        ends_q, ends_k: where the queries and keys of the chunks end, from 0, int32 `[chunks + 1]`.
        longest_q, longest_k: of a chunk.
    """

    back: Tensor
    spans: tuple[tuple[int, int, int], ...]
    keys: Tensor
    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int


class Padded(NamedTuple):
    """Tokens of a pack after padding.

    Attributes:
        lengths: of the samples.
        positions: in its sample of each token, `[tokens]`.
        at: place of each token of the micro-batch, `[unpadded]`.
        owned: of each context-parallel rank the tokens it has, in its order, `[cp, local]`.
    """

    lengths: tuple[int, ...]
    positions: NDArray[np.int64]
    at: NDArray[np.int64]
    owned: NDArray[np.int64]


def pad(lengths: Sequence[int], grid: Grid) -> Padded:
    """Where the tokens of samples with `lengths` go; see the module. An empty pack has padding alone."""
    unit = 2 * grid.cp if grid.cp > 1 else 1
    padded = [-(-length // unit) * unit for length in lengths]
    whole = np.lcm(unit, grid.cp * grid.tokens_by)
    if missing := -sum(padded) % whole or (0 if padded else max(whole, 2)):
        padded.append(int(missing))
    starts = np.concatenate([[0], np.cumsum(padded)])
    at = [start + np.arange(length) for start, length in zip(starts, lengths, strict=False)]
    if grid.cp == 1:
        owned = np.arange(starts[-1])[None]
    else:
        owned = np.stack([_chunks(starts, grid.cp, rank) for rank in range(grid.cp)])
    return Padded(
        tuple(padded),
        np.concatenate([np.arange(length) for length in padded]),
        np.concatenate([np.zeros(0, np.int64), *at]),
        owned,
    )


def _chunks(starts: NDArray[np.int64], cp: int, rank: int) -> NDArray[np.int64]:
    parts: list[NDArray[np.int64]] = []
    for start, stop in itertools.pairwise(starts):
        size = (stop - start) // (2 * cp)
        parts += [np.arange(start + n * size, start + (n + 1) * size) for n in (rank, 2 * cp - 1 - rank)]
    return np.concatenate(parts)


def make_packed(
    micro: MicroBatch,
    scored: NDArray[np.bool_],
    grid: Grid,
    angles: Angles,
    device: torch.device,
    *,
    padding_id: int | None = None,
) -> Packed:
    """This rank's part of `micro`, which may have no samples.

    Args:
        scored: mask of the tokens whose log-probs are wanted, `[tokens]`.
        padding_id: token whose embedding gets no gradient where it is read, as in transformers; None is none.

    Raises:
        TrainError: a token is asked for that nothing predicts; see `predicted_tokens`.
    """
    index, temperature = predicted_tokens(micro, scored) if micro.samples else (np.zeros(0, np.int64), np.zeros(0))
    padded = pad(micro.lengths, grid)
    ids = np.zeros(len(padded.positions), np.int64)
    if micro.samples:
        ids[padded.at] = micro.ids
    mine = padded.owned[grid.cp_rank]
    before = padded.at[index] - 1
    holder, row = _owners(padded.owned)
    by_rank = [np.flatnonzero(holder[before] == rank) for rank in range(grid.cp)]
    most = max(len(chosen) for chosen in by_rank)
    order = np.empty(len(index), np.int64)
    for rank, chosen in enumerate(by_rank):
        order[chosen] = rank * most + np.arange(len(chosen))
    chosen = by_rank[grid.cp_rank]
    still = np.split(ids[mine] == padding_id, grid.tokens_by)[grid.tokens_rank]
    cos, sin = angles(_tensor(padded.positions[mine], device))
    cumulative = torch.from_numpy(np.concatenate([[0], np.cumsum(padded.lengths)])).to(device, torch.int32)
    longest = max(padded.lengths)
    return Packed(
        qkv_format="thd", cu_seqlens_q=cumulative, cu_seqlens_kv=cumulative, max_seqlen_q=longest,
        max_seqlen_kv=longest, ids=_tensor(ids[mine], device).unsqueeze(0), still=_flags(still, device),
        cos=cos, sin=sin, lengths=padded.lengths,
        layout=layout(padded.lengths, device) if grid.cp == 1 else None,
        across=across_ranks(padded, grid, device) if grid.cp > 1 else None,
        rows=_tensor(row[before[chosen]], device), targets=_tensor(ids[padded.at[index[chosen]]], device),
        temperature=torch.from_numpy(temperature[chosen].astype(np.float32)).to(device),
        counts=tuple(len(each) for each in by_rank), order=_tensor(order, device), index=_tensor(index, device),
    )  # fmt: skip


def across_ranks(padded: Padded, grid: Grid, device: torch.device) -> Across:
    """Of this rank among those of `grid`."""
    spans: list[tuple[int, int, int]] = []
    start = 0
    for length in padded.lengths:
        size = length // (2 * grid.cp)
        spans += [(size, start, start + (n + 1) * size) for n in (grid.cp_rank, 2 * grid.cp - 1 - grid.cp_rank)]
        start += length
    queries, keys = [size for size, _, _ in spans], [stop - start for _, start, stop in spans]
    ends_q, ends_k = (
        torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32, device=device) for sizes in (queries, keys)
    )
    return Across(
        back=_tensor(np.argsort(padded.owned.reshape(-1)), device),
        spans=tuple(spans),
        keys=_tensor(np.concatenate([np.arange(start, stop) for _, start, stop in spans]), device),
        ends_q=ends_q,
        ends_k=ends_k,
        longest_q=max(queries),
        longest_k=max(keys),
    )


def _flags(values: NDArray[np.bool_], device: torch.device) -> Tensor | None:
    return torch.from_numpy(values).to(device).view(-1, 1, 1) if values.any() else None


def _owners(owned: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each token the rank that has it, and its row there."""
    holder, row = np.empty(owned.size, np.int64), np.empty(owned.size, np.int64)
    for rank, tokens in enumerate(owned):
        holder[tokens], row[tokens] = rank, np.arange(len(tokens))
    return holder, row


def _tensor(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)
