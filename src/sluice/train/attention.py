"""Attention over packed samples, registered with transformers as `sluice_packed`.

A pack is one row of tokens, `[1, tokens]`, in which each sample may attend only to itself. A mask that says
so has tokens × tokens entries; here samples of similar length are taken together instead, gathered to
`[samples, heads, longest, head_dim]` with padding on the right, and attended causally. Padding on the right
is never seen by a causal query, so no mask exists at all: memory and time follow Σ length², not (Σ length)².

On an accelerator long samples are attended to by cuDNN's kernel, which is up to twice as fast there as FlashAttention 2
and plans for tens of milliseconds at each new shape: they are padded to one of sixteen lengths in each octave. Short
ones, which come in any number and length, are FlashAttention's.

What samples begin with in common is in the model's row of tokens only once: its states are laid out for each sample
here, attended to, and their gradients added up.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from sluice.errors import TrainError
from sluice.train.buckets import LONG, Bucket, PackLayout

PACKED_ATTENTION = "sluice_packed"
"""Name under which `load_model(attn_implementation=...)` finds it."""
_FALLBACK = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_KERNELS = {
    "auto": (SDPBackend.CUDNN_ATTENTION, *_FALLBACK, SDPBackend.MATH),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, *_FALLBACK),
    "flash": _FALLBACK,
}
"""In order of preference: what one cannot do, such as float32, the next one does. Only the last of `auto` computes
scores of length × length; for short samples torch itself chooses among all of them."""
Kernel = Literal["auto", "cudnn", "flash"]


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
    kernel: Kernel = "auto",
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
        kernel: on an accelerator; `auto` chooses by the length of samples.
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
    outputs = [_attend(bucket, q[i], k[i], v[i], scaling, kernel) for i, bucket in enumerate(pack.buckets)]
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


def _attend(bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, kernel: Kernel) -> Tensor:
    """One bucket: `[bucket slots, heads, head_dim]` states to `[bucket slots, heads · head_dim]`."""
    q, k, v = (
        states.view(bucket.count, bucket.longest, *states.shape[1:]).transpose(1, 2) for states in (query, key, value)
    )
    choice = q.is_cuda and (kernel != "auto" or bucket.longest >= LONG)
    with sdpa_kernel(list(_KERNELS[kernel]), set_priority=True) if choice else nullcontext():
        output = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    return output.transpose(1, 2).reshape(bucket.slots, -1)


def no_mask(*_: Any, **__: Any) -> None:
    """Mask function of packed attention: transformers builds none."""
    return


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, no_mask)
