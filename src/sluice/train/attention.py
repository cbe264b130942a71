"""Attention over packed samples, registered with transformers as `sluice_packed`.

A pack is one row of tokens, `[1, tokens]`, in which each sample may attend only to itself. A mask that says
so has tokens × tokens entries; here samples of similar length are taken together instead, gathered to
`[samples, heads, longest, head_dim]` with padding on the right, and attended causally. Padding on the right
is never seen by a causal query, so no mask exists at all: memory and time follow Σ length², not (Σ length)².

What samples begin with in common is in the model's row of tokens only once: its states are laid out for each sample
here, attended to, and their gradients added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from sluice.errors import TrainError

PACKED_ATTENTION = "sluice_packed"
"""Name under which `load_model(attn_implementation=...)` finds it."""
_FREE_PADDING = 1_024
"""Padded tokens of a bucket below which one more kernel call would cost more than the padding does."""
_PADDING_SHARE = 0.25
"""Padded tokens of a bucket, as a share of its real ones, that are always accepted."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Samples of similar length that are attended together: how many, and tokens of the longest."""

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


def layout(lengths: Sequence[int], device: torch.device, copies: NDArray[np.int64] | None = None) -> PackLayout:
    """The layout of samples that stand end to end, each of at least one token, in any order.

    Samples are taken from long to short; a bucket grows until its padding exceeds both a quarter of its
    tokens and 1,024 tokens.

    Args:
        lengths: tokens of each sample.
        device: where the indices go.
        copies: the token that each token is a copy of, as `first_copies` returns it; None computes all.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    tokens = 0
    for index in order:
        tokens += lengths[index]
        slots = lengths[groups[-1][0]] * (len(groups[-1]) + 1) if groups else 0
        if not groups or slots - tokens > max(_FREE_PADDING, _PADDING_SHARE * tokens):
            groups.append([])
            tokens = lengths[index]
        groups[-1].append(index)
    buckets = tuple(Bucket(len(group), lengths[group[0]]) for group in groups)
    longest = buckets[0].longest if buckets else 0
    if copies is None:
        if sum(bucket.slots for bucket in buckets) == sum(lengths) and len(buckets) <= 1:
            return PackLayout(tuple(lengths), buckets, None, longest)
        return PackLayout(tuple(lengths), buckets, _moves(lengths, groups, device), longest)
    own = copies == np.arange(len(copies))
    row = (np.cumsum(own) - 1)[copies]
    sharing = Sharing(torch.from_numpy(np.flatnonzero(own)).to(device), torch.from_numpy(row).to(device))
    return PackLayout(tuple(lengths), buckets, _share(_moves(lengths, groups, device), sharing), longest, sharing)


def _share(moves: Moves, sharing: Sharing) -> Moves:
    """Moves of rows, from those of all tokens."""
    scatter = moves.scatter.index_select(0, sharing.tokens)
    real = torch.zeros_like(moves.real)
    real[scatter] = True
    again = torch.nonzero(moves.real & ~real)[:, 0]
    return Moves(sharing.row.index_select(0, moves.gather), scatter, real, again)


def _moves(lengths: Sequence[int], groups: Sequence[Sequence[int]], device: torch.device) -> Moves:
    counts = np.asarray(lengths, dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    gathers: list[np.ndarray] = []
    reals: list[np.ndarray] = []
    for group in groups:
        slot = np.arange(counts[group[0]])
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


class _Pad(torch.autograd.Function):
    """Rows to padded slots. The gradient of padding is dropped (no query sees it), those of `again` are added."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Tensor, scatter: Tensor, again: Tensor | None) -> Tensor:
        ctx.save_for_backward(gather, scatter, again)
        return rows.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gather, scatter, again = ctx.saved_tensors
        grad = grads[0].index_select(0, scatter)
        if again is not None:
            grad.index_add_(0, gather.index_select(0, again), grads[0].index_select(0, again))
        return grad, None, None, None


class _Unpad(torch.autograd.Function):
    """Inverse of `_Pad`; padding gets a gradient of exactly 0."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, gather: Tensor, scatter: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(gather, real)
        return slots.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gather, real = ctx.saved_tensors
        return grads[0].index_select(0, gather).mul_(real), None, None, None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: PackLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sample of a pack to itself.

    Args:
        module: the attention layer that calls; named in errors.
        query: `[1, heads, rows, head_dim]`.
        key, value: `[1, key/value heads, rows, head_dim]`.
        attention_mask: must be None; `no_mask` sees to it.
        pack: the layout of the samples.
        scaling: of the scores; None is head_dim ** -0.5.
        sliding_window: accepted where no sample is longer than it.
        softcap, s_aux: variants this kernel does not have.

    Returns:
        `[1, rows, heads, head_dim]`, and None for the weights.

    Raises:
        TrainError: the model asks for something that packed attention does not do.
    """
    name = type(module).__name__
    if pack is None:
        raise TrainError(
            f"{name} did not pass on the pack layout, so samples of a pack could not be told apart",
            hint="this model family is not supported by the torch trainer",
        )
    if softcap is not None or s_aux is not None or attention_mask is not None:
        asked = "logit softcapping" if softcap is not None else "attention sinks" if s_aux is not None else "a mask"
        raise TrainError(
            f"{name} asks for {asked}, which packed attention does not have",
            hint="this model family is not supported by the torch trainer",
        )
    if sliding_window is not None and pack.longest > sliding_window:
        raise TrainError(
            f"a sample has {pack.longest} tokens, the sliding window of {name} is {sliding_window}",
            hint="packed attention has no window; train on samples that fit into it",
        )
    sizes = [bucket.slots for bucket in pack.buckets]
    # Of a shared row one query's output is used, so that the others have no gradient; keys and values are all seen.
    q = _to_slots(query, pack, None).split(sizes)
    again = pack.moves.again if pack.moves is not None else None
    k, v = (_to_slots(states, pack, again).split(sizes) for states in (key, value))
    outputs = [_attend(bucket, q[i], k[i], v[i], scaling) for i, bucket in enumerate(pack.buckets)]
    slots = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if pack.moves is not None:
        moves = pack.moves
        slots = _Unpad.apply(slots, moves.gather, moves.scatter, moves.real)
    return slots.view(1, -1, query.shape[1], value.shape[-1]), None


def _to_slots(states: Tensor, pack: PackLayout, again: Tensor | None) -> Tensor:
    """`[1, heads, rows, head_dim]` to `[slots, heads, head_dim]`; see `_Pad` for `again`."""
    heads, _, head_dim = states.shape[1:]
    rows = states[0].transpose(0, 1).reshape(-1, heads * head_dim)
    if pack.moves is not None:
        rows = _Pad.apply(rows, pack.moves.gather, pack.moves.scatter, again)
    return rows.view(-1, heads, head_dim)


def _attend(bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One bucket: `[bucket slots, heads, head_dim]` states to `[bucket slots, heads · head_dim]`."""
    q, k, v = (
        states.view(bucket.count, bucket.longest, *states.shape[1:]).transpose(1, 2) for states in (query, key, value)
    )
    output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return output.transpose(1, 2).reshape(bucket.slots, -1)


def no_mask(*_: Any, **__: Any) -> None:
    """Mask function of packed attention: transformers builds none."""
    return


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, no_mask)
