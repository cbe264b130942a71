"""Paged attention for Hugging Face modules, with results that do not depend on the batch.

A model built with `attn_implementation="sluice_paged"` hands its queries, keys and values to
`paged_attention`, which writes the keys and values into the paged cache and attends over block tables. All
sequences of a step are packed into one forward pass of shape `[1, tokens]`; transformers makes no mask for
an implementation that has no mask function registered, and needs none.

Every query token, of a prompt or just drawn, alone or among 256, goes through the same sequence of
products, so that one code path serves prefill, decode, prefix reuse and recomputation. That they agree **bit
for bit** rests on what was measured on two CPUs (torch 2.13 with MKL, AVX-512 and AVX2, one thread, float32;
with AVX-512 likewise bfloat16, where every shape agreed):

* a row of `X @ W` does not depend on the number of rows, once there are at least 16 (below, MKL takes other
  kernels: for 128 columns 1..5 rows differ, for 384 and more 1..15 do). So the tokens of a forward pass and
  the rows of the language-model head are padded to multiples of `ROWS`;
* batched products of queries and keys agree from 2 rows a matrix for head sizes up to 32, 3 for 64 and 5 for
  128 with AVX-512, from 4 with AVX2. So the queries of a tile are padded to `head_dim / 16` rows, at least 4;
* batched products of probabilities and values do not change when zeros are appended, up to 384 keys with
  AVX-512, 192 with AVX2; beyond, MKL splits the sum otherwise. So values are multiplied in pieces of `PIECE`
  keys and added in order;
* softmax over keys, log-softmax over the vocabulary and RMS norms do not depend on appended masked keys (in
  multiples of 16) or on the number of rows.

Taking any of the paddings away makes `test_embedded_engine.py` fail. Not covered: several threads and
matrices of about 900 columns and more, where MKL divides sums by the number of rows (differs below some 400
rows; with two threads smaller models agree); mixture-of-experts layers, whose expert products have as many
rows as tokens came to the expert; other BLAS libraries and processors, until the test has run there; GPUs.
There log-probs agree to rounding (about 1e-6), and a token differs where the noise falls that close to an
edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from sluice.errors import EngineError

ATTENTION = "sluice_paged"
"""The name under which transformers knows `paged_attention`."""
ROWS = 16
"""Rows of matrix products are padded to a multiple of this."""
TILE = 64
"""Most query tokens of one sequence that attend together."""
SHORT = 64
"""Sequences up to this many tokens are padded to one length; beyond, to the next power of two at most."""
PIECE = 192
"""Keys whose probabilities × values are summed in one product."""
GROUP_ELEMENTS = 1 << 23
"""Most scores, and most gathered keys and values, that are held at once (float32)."""

CONTEXT = "sluice_context"
"""The keyword with which a forward pass hands its `ForwardContext` to `paged_attention`."""
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sinks", "head_mask")


class KVShape(NamedTuple):
    """What one layer caches for a token: `heads` keys of `key_dim` numbers and values of `value_dim`.

    The two differ in multi-head latent attention.
    """

    heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers that a key or a value takes in the cache; the shorter of the two is filled up with zeros."""
        return max(self.key_dim, self.value_dim)


class PagedCache:
    """Keys and values: one tensor a layer, shape `[2 * kv_heads, blocks * block_tokens, width]`.

    The first half of the leading dimension holds keys, the second values. Block 0 takes the padding.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        *,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self.shapes = tuple(shapes)
        slots = (num_blocks + 1) * block_tokens
        self._sizes = [(2 * shape.heads, slots, shape.width) for shape in shapes]
        self._dtype, self._device = dtype, device
        self.layers: list[Tensor] = []
        self.allocate()

    def allocate(self) -> None:
        """Take the memory, empty."""
        self.layers = [torch.zeros(size, dtype=self._dtype, device=self._device) for size in self._sizes]

    def free(self) -> None:
        """Give the memory up with all that it holds, until `allocate`."""
        self.layers = []

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store `[kv_heads, tokens, width]` keys and values at `slots` `[tokens]`."""
        self.layers[layer].index_copy_(1, slots, torch.cat((key, value)))

    def gather(self, layer: int, blocks: Tensor) -> Tensor:
        """The keys and values of `blocks` `[n]`: `[2 * kv_heads, n, block_tokens * width]`."""
        cache = self.layers[layer]
        return cache.view(cache.shape[0], -1, self.block_tokens * cache.shape[2]).index_select(1, blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Groups of queries with similar lengths that attend in one batched product.

    Attributes:
        queries: index of each query in the packed tokens, `[tiles * Q]`; short tiles repeat their last one.
        blocks: block ids of each tile's keys, `[tiles * blocks]`.
        mask: 0 where a query may attend and -inf elsewhere, `[tiles, 1, Q, keys]`.
    """

    queries: Tensor
    blocks: Tensor
    mask: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tiles, queries of one, keys of one."""
        return self.mask.shape[0], self.mask.shape[2], self.mask.shape[3]


@dataclass(slots=True, eq=False)
class ForwardContext:
    """What `paged_attention` needs to know about one forward pass.

    Attributes:
        cache: where keys and values lie.
        slots: where each packed token's go, `[tokens]`.
        tiles: which queries attend to which blocks.
        layers: the layers that have attended, in order.
    """

    cache: PagedCache
    slots: Tensor
    tiles: list[Tiles]
    layers: list[int]


def query_rows(head_dim: int, group: int) -> int:
    """Least queries of a tile, so that its `group` heads fill enough rows of a product."""
    return -(-max(4, head_dim // 16) // group)


def plan_tiles(
    table: NDArray[np.int64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    *,
    block_tokens: int,
    heads: int,
    key_elements: int,
    min_queries: int,
    device: torch.device,
) -> list[Tiles]:
    """Cut the queries of a step into tiles and group tiles of similar shape.

    Args:
        table: block ids of each sequence, `[sequences, blocks]`.
        starts: position of each sequence's first query; counts: how many queries it has. `[sequences]`.
        heads: query heads; key_elements: numbers that the cache holds for a token. They bound a group.
        min_queries: a tile is padded to this many.
    """
    per_seq = -(-counts // TILE)
    owner = np.repeat(np.arange(len(counts)), per_seq)
    offset = (np.arange(len(owner)) - np.repeat(np.cumsum(per_seq) - per_seq, per_seq)) * TILE
    packed = (np.cumsum(counts) - counts)[owner] + offset
    size = np.minimum(counts[owner] - offset, TILE)
    first = starts[owner] + offset
    keys = first + size
    # Group by the powers of two above queries and keys: padding at most doubles either.
    query_class = np.ceil(np.log2(np.maximum(size, min_queries))).astype(np.int64)
    key_class = np.ceil(np.log2(np.maximum(keys, SHORT))).astype(np.int64)
    classes = query_class * 64 + key_class
    step = math.lcm(block_tokens, ROWS)
    tiles: list[Tiles] = []
    for name in np.unique(classes):
        members = np.flatnonzero(classes == name)
        num_queries = max(int(size[members].max()), min_queries)
        num_keys = -(-int(keys[members].max()) // step) * step
        most = max(GROUP_ELEMENTS // (num_keys * max(heads * num_queries, key_elements)), 1)
        for at in range(0, len(members), most):
            part = members[at : at + most]
            inner = np.minimum(np.arange(num_queries), size[part, None] - 1)
            blocks = np.zeros((len(part), num_keys // block_tokens), dtype=np.int64)
            width = min(blocks.shape[1], table.shape[1])
            blocks[:, :width] = table[owner[part], :width]
            hidden = np.arange(num_keys) > (first[part, None] + inner)[:, :, None]
            mask = np.where(hidden, np.float32(-np.inf), np.float32(0.0))[:, None]
            tiles.append(
                Tiles(
                    queries=torch.from_numpy((packed[part, None] + inner).ravel()).to(device),
                    blocks=torch.from_numpy(blocks.ravel()).to(device),
                    mask=torch.from_numpy(mask).to(device),
                )
            )
    return tiles


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        query: `[1, heads, tokens, key_dim]`; key, value: `[1, kv_heads, tokens, key_dim or value_dim]`.
        kwargs: carries the `ForwardContext`, or a dictionary that takes the layers' `KVShape`s.

    Returns:
        `[1, tokens, heads, value_dim]`, and no attention weights.

    Raises:
        EngineError: the layer asks for something that full causal attention is not.
    """
    context = kwargs.get(CONTEXT)
    if not isinstance(context, (ForwardContext, dict)):
        raise EngineError(f"{type(module).__name__} does not pass keyword arguments on to its attention")
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked or attention_mask is not None or not getattr(module, "is_causal", True):
        what = asked or (["a mask"] if attention_mask is not None else ["attention that is not causal"])
        raise EngineError(f"{type(module).__name__} wants {', '.join(what)}, which paged attention lacks")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    shape = KVShape(key.shape[1], key.shape[3], value.shape[3])
    tokens, heads, head_dim = query.shape[2], query.shape[1], query.shape[3]
    if isinstance(context, dict):
        context[layer] = shape
        return query.new_zeros(1, tokens, heads, shape.value_dim), None
    cache = context.cache
    if shape != cache.shapes[layer] or key.shape[2] != tokens:
        raise EngineError(
            f"{type(module).__name__} has keys {tuple(key.shape[1:])} and values {tuple(value.shape[1:])} for {tokens} "
            f"tokens; the cache of this layer is made for {cache.shapes[layer]}"
        )
    context.layers.append(layer)
    cache.write(layer, context.slots, _widen(key[0], shape.width), _widen(value[0], shape.width))
    scaled = query[0].transpose(0, 1).float() * (head_dim**-0.5 if scaling is None else scaling)
    scaled = _widen(scaled, shape.width)
    out = torch.zeros((tokens, heads, shape.width), dtype=torch.float32, device=query.device)
    for tiles in context.tiles:
        out.index_copy_(0, tiles.queries, _attend(scaled, cache, layer, tiles))
    return out[:, :, : shape.value_dim].to(query.dtype)[None], None


def _widen(states: Tensor, width: int) -> Tensor:
    """`[…, dim]` with zeros after it, up to `width`."""
    missing = width - states.shape[-1]
    return torch.nn.functional.pad(states, (0, missing)) if missing else states


def _attend(scaled: Tensor, cache: PagedCache, layer: int, tiles: Tiles) -> Tensor:
    """Attention of one group of tiles; `[tokens, heads, head_dim]` → `[tiles * Q, heads, head_dim]`."""
    n, q, keys = tiles.shape
    heads, head_dim = scaled.shape[1:]
    kv_heads = cache.shapes[layer].heads
    group = heads // kv_heads
    rows = scaled.index_select(0, tiles.queries).view(n, q, kv_heads, group, head_dim)
    rows = rows.permute(2, 0, 3, 1, 4).reshape(kv_heads * n, group * q, head_dim)
    stored = cache.gather(layer, tiles.blocks).float().view(2, kv_heads * n, keys, head_dim)
    scores = torch.bmm(rows, stored[0].transpose(1, 2))
    scores.view(kv_heads, n, group, q, keys).add_(tiles.mask)
    weights = torch.softmax(scores, dim=-1)
    mixed = torch.bmm(weights[:, :, :PIECE], stored[1][:, :PIECE])
    for at in range(PIECE, keys, PIECE):
        mixed += torch.bmm(weights[:, :, at : at + PIECE], stored[1][:, at : at + PIECE])
    mixed = mixed.view(kv_heads, n, group, q, head_dim).permute(1, 3, 0, 2, 4)
    return mixed.reshape(n * q, heads, head_dim)


AttentionInterface.register(ATTENTION, paged_attention)
