"""Core attention over packs: causal attention of each sample to itself, with rotary embedding, on torch's kernels.

Without context parallelism samples of similar length are attended together (`train.attention`). With it each rank
gathers the keys and values of all, and attends from its two chunks of each sample to what stands before and in them.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sluice.train.attention import packed_attention
from sluice.train.backends.megatron.division import context_group
from sluice.train.backends.megatron.norm import kernels
from sluice.train.backends.megatron.packs import Packed

_ROWS = 256
"""Queries on a CPU that are masked at one time: memory is this many rows of scores, not length × length."""


class PackedAttention(MegatronModule):
    """Takes the arguments that megatron-core builds core attention with."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self._scale = softmax_scale
        self._rotate = kernels(config.compile_small)[1]
        self._interleaved: bool = config.interleaved
        self._kernel: Literal["auto", "cudnn", "flash", "varlen"] = config.attention_kernel
        self._group = context_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packed | None = None,
    ) -> Tensor:
        """Queries `[local, heads, head_dim]`, keys and values `[local, groups, head_dim]`, all of this rank.

        Returns:
            `[local, heads · head_dim]`.
        """
        pack = packed_seq_params
        assert pack is not None
        query, key = self._rotate(query, key, pack.cos, pack.sin, self._interleaved)
        if self._group.size() > 1:
            return self._across(query, key, value, pack)
        if self._kernel == "varlen" and query.is_cuda:
            ends = pack.cu_seqlens_q
            return _varlen(query, key, value, ends, ends, pack.max_seqlen_q, pack.max_seqlen_q, self._scale)
        if query.is_cuda and query.dtype == torch.float32:  # one kernel takes it, and wants as many keys as queries
            times = query.shape[1] // key.shape[1]
            key, value = (states.repeat_interleave(times, dim=1) for states in (key, value))
        q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in (query, key, value))
        kernel = "auto" if self._kernel == "varlen" else self._kernel  # not on an accelerator
        output, _ = packed_attention(self, q, k, v, None, pack=pack.layout, scaling=self._scale, kernel=kernel)
        return output[0].flatten(1)

    def _across(self, query: Tensor, key: Tensor, value: Tensor, pack: Packed) -> Tensor:
        across = pack.across
        assert across is not None
        key, value = (
            gather_from_sequence_parallel_region(states.contiguous(), group=self._group).index_select(0, across.back)
            for states in (key, value)
        )
        if not query.is_cuda:
            parts = query.split([size for size, _, _ in across.spans])
            outputs = [
                _lower_right(part, key[start:stop], value[start:stop], self._scale)
                for part, (_, start, stop) in zip(parts, across.spans, strict=True)
            ]
            return torch.cat(outputs).flatten(1)
        key, value = key.index_select(0, across.keys), value.index_select(0, across.keys)
        return _varlen(query, key, value, across.ends_q, across.ends_k, across.longest_q, across.longest_k, self._scale)


def _lower_right(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The last queries of a sample, `[rows, heads, head_dim]`, to its keys so far; some rows at a time."""
    k, v = (states.transpose(0, 1).unsqueeze(0) for states in (key, value))
    first, outputs = len(key) - len(query), []
    for at, q in enumerate(query.split(_ROWS)):
        seen = torch.arange(len(key)) <= (first + at * _ROWS + torch.arange(len(q))).unsqueeze(1)
        q = q.transpose(0, 1).unsqueeze(0)
        outputs.append(scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float | None,
) -> Tensor:
    """torch's FlashAttention over sequences of any lengths; causal from the lower right corner."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    if "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.11 does without being asked
        options["enable_gqa"] = True
    output = varlen_attn(query, key, value, ends_q, ends_k, longest_q, longest_k, window_size=(-1, 0), **options)
    assert isinstance(output, Tensor)
    return output.flatten(1)
