"""How a weight of Megatron's is made of a checkpoint's tensors, and which part of it each tensor-parallel rank holds.

Every split only moves numbers, so that a tensor which is taken apart and put together again is the same to the bit. It
serves for whatever has the shape of the weights: gradients and moments of an optimizer as well. The order of rows in
the fused weights is that of megatron-core (`SelfAttention.get_query_key_value_tensors`, `MLP` with gated linear units).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class SafeSlice(Protocol):
    """A tensor, or one that stays in its file until it is indexed (`get_slice` of safetensors)."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


class Split(Protocol):
    """The two directions between tensors of a checkpoint and the parts of the ranks."""

    def part(self, slices: Sequence[SafeSlice], rank: int, size: int) -> Tensor:
        """What tensor-parallel rank `rank` of `size` holds. Of the slices only its rows or columns are read.

        Where the slices are tensors, it may share their memory.
        """
        ...

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of the checkpoint, contiguous, from the parts of all ranks in order."""
        ...


@dataclass(frozen=True)
class Replicated:
    """One tensor that every rank holds whole."""

    def part(self, slices: Sequence[SafeSlice], rank: int, size: int) -> Tensor:
        return slices[0][:]

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (parts[0],)


@dataclass(frozen=True)
class Rows:
    """One tensor of `rows` rows, an equal run of them to each rank: a column-parallel layer or an embedding."""

    rows: int

    def part(self, slices: Sequence[SafeSlice], rank: int, size: int) -> Tensor:
        start, end = _run(self.rows, rank, size)
        return slices[0][start:end]

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(tuple(parts)),)


@dataclass(frozen=True)
class Columns:
    """One tensor `[rows, columns]`, an equal run of columns to each rank: a row-parallel layer."""

    columns: int

    def part(self, slices: Sequence[SafeSlice], rank: int, size: int) -> Tensor:
        start, end = _run(self.columns, rank, size)
        return slices[0][:, start:end].contiguous()

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(tuple(parts), dim=1),)


@dataclass(frozen=True)
class GroupedHeads:
    """Queries, keys and values: rows stand group by group, in each its query heads, its key head, its value head.

    Args:
        heads: query heads of the model.
        groups: key-value heads of the model; a rank holds whole groups.
        head_dim: rows of a head.
    """

    heads: int
    groups: int
    head_dim: int

    def part(self, slices: Sequence[SafeSlice], rank: int, size: int) -> Tensor:
        start, end = _run(self.groups, rank, size)
        rows = [slice_[start * width : end * width] for slice_, width in zip(slices, self._widths, strict=True)]
        grouped = [part.unflatten(0, (end - start, width)) for part, width in zip(rows, self._widths, strict=True)]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        together = torch.cat(tuple(parts))
        grouped = together.unflatten(0, (self.groups, sum(self._widths)))
        return tuple(part.flatten(0, 1).contiguous() for part in grouped.split(self._widths, dim=1))

    @property
    def _widths(self) -> list[int]:
        """Rows of one group in the tensors of queries, keys and values."""
        return [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]


@dataclass(frozen=True)
class GateAndUp:
    """Gate and up projection, two tensors of `rows` rows each; a rank holds its rows of the gate, then those of up."""

    rows: int

    def part(self, slices: Sequence[SafeSlice], rank: int, size: int) -> Tensor:
        start, end = _run(self.rows, rank, size)
        return torch.cat([one[start:end] for one in slices])

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])


@dataclass(frozen=True)
class FusedGateAndUp:
    """The same, from one tensor of 2 · `rows` rows that holds all of the gate, then all of up."""

    rows: int

    def part(self, slices: Sequence[SafeSlice], rank: int, size: int) -> Tensor:
        start, end = _run(self.rows, rank, size)
        fused = slices[0]
        return torch.cat([fused[start:end], fused[self.rows + start : self.rows + end]])

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(GateAndUp(self.rows).whole(parts)),)


def _run(length: int, rank: int, size: int) -> tuple[int, int]:
    """First and last (excluded) of the `length // size` items of `rank`."""
    if length % size:
        raise ValueError(f"{length} rows or columns cannot be shared out evenly to {size} ranks")
    each = length // size
    return rank * each, (rank + 1) * each
