"""Attention over packed samples, registered with transformers as `sluice_packed`.

A pack is one row of tokens, `[1, tokens]`, in which each sample may attend only to itself. A mask that says
so has tokens × tokens entries; here samples of similar length are taken together instead, gathered to
`[samples, heads, longest, head_dim]` with padding on the right, and attended causally. Padding on the right
is never seen by a causal query, so no mask exists at all: memory and time follow Σ length², not (Σ length)².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
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


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Neighbouring samples that are attended together.

    Attributes:
        start, end: their tokens in the pack, `[start, end)`.
        count, longest: samples, and tokens of the longest.
        gather: row of the bucket for each padded slot, int64 `[count · longest]`; None when all samples
            are equally long, so that nothing needs to move.
        scatter: padded slot of each token, int64 `[end - start]`.
        real: 1 at slots that hold a token, `[count · longest, 1]`.
    """

    start: int
    end: int
    count: int
    longest: int
    gather: Tensor | None
    scatter: Tensor | None
    real: Tensor | None


@dataclass(frozen=True, slots=True)
class PackLayout:
    """Where the samples of a pack lie. Handed to the model as the keyword `pack`; built once per pack."""

    buckets: tuple[Bucket, ...]
    num_tokens: int
    longest: int


def layout(lengths: Sequence[int], device: torch.device) -> PackLayout:
    """The layout of samples that stand end to end, each at least one token; best when sorted by length.

    A bucket grows until its padding exceeds both a quarter of its tokens and 1,024 tokens.
    """
    edges, longest, tokens = [0], 0, 0
    for index, length in enumerate(lengths):
        grown = max(longest, length)
        padding = grown * (index - edges[-1] + 1) - (tokens + length)
        if padding > max(_FREE_PADDING, _PADDING_SHARE * (tokens + length)):
            edges.append(index)
            grown, tokens = length, 0
        longest, tokens = grown, tokens + length
    edges.append(len(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    buckets = tuple(
        _bucket(lengths[first:last], int(starts[first]), device) for first, last in pairwise(edges) if last > first
    )
    return PackLayout(buckets, int(starts[-1]), max(lengths, default=0))


def _bucket(lengths: Sequence[int], start: int, device: torch.device) -> Bucket:
    counts = np.asarray(lengths, dtype=np.int64)
    longest, total = int(counts.max()), int(counts.sum())
    if (counts == longest).all():
        return Bucket(start, start + total, len(counts), longest, None, None, None)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    slot = np.arange(longest)
    real = slot[None, :] < counts[:, None]
    gather = first[:, None] + np.minimum(slot[None, :], counts[:, None] - 1)
    scatter = np.flatnonzero(real)
    return Bucket(
        start,
        start + total,
        len(counts),
        longest,
        torch.from_numpy(gather.reshape(-1)).to(device),
        torch.from_numpy(scatter).to(device),
        torch.from_numpy(real.reshape(-1, 1)).to(device),
    )


class _Pad(torch.autograd.Function):
    """Rows of tokens to rows of padded slots; the gradient of padding is dropped (no query sees it)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        return rows.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (scatter,) = ctx.saved_tensors
        return grads[0].index_select(0, scatter), None, None


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
        query: `[1, heads, tokens, head_dim]`.
        key, value: `[1, key/value heads, tokens, head_dim]`.
        attention_mask: must be None; `no_mask` sees to it.
        pack: the layout of the samples.
        scaling: of the scores; None is head_dim ** -0.5.
        sliding_window: accepted where no sample is longer than it.
        softcap, s_aux: variants this kernel does not have.

    Returns:
        `[1, tokens, heads, head_dim]`, and None for the weights.

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
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]
    outputs = [_attend(bucket, rows[0], rows[1], rows[2], scaling) for bucket in pack.buckets]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0), None


def _attend(bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One bucket of `[tokens, heads, head_dim]` states; returns `[bucket tokens, heads, head_dim]`."""
    grouped = query.shape[1] != key.shape[1]
    query, key, value = (_slots(states[bucket.start : bucket.end], bucket) for states in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    slots = output.transpose(1, 2).reshape(bucket.count * bucket.longest, -1)
    if bucket.gather is not None:
        slots = _Unpad.apply(slots, bucket.gather, bucket.scatter, bucket.real)
    return slots.view(bucket.end - bucket.start, query.shape[1], -1)


def _slots(states: Tensor, bucket: Bucket) -> Tensor:
    """`[bucket tokens, heads, head_dim]` to `[samples, heads, longest, head_dim]`."""
    heads, head_dim = states.shape[1:]
    rows = states.reshape(len(states), heads * head_dim)
    if bucket.gather is not None:
        rows = _Pad.apply(rows, bucket.gather, bucket.scatter)
    return rows.view(bucket.count, bucket.longest, heads, head_dim).transpose(1, 2)


def no_mask(*_: Any, **__: Any) -> None:
    """Mask function of packed attention: transformers builds none."""
    return


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, no_mask)
