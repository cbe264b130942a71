"""The model and its cache: turns chunks into logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sluice.config.model import DType
from sluice.errors import EngineError
from sluice.rollout.engines.embedded.fit import check_config, refusal
from sluice.rollout.engines.embedded.paged import (
    ATTENTION,
    CONTEXT,
    ROWS,
    ForwardContext,
    KVShape,
    PagedCache,
    plan_tiles,
    query_rows,
)
from sluice.rollout.engines.embedded.scheduler import Chunk

PROBE_TOKENS = 12
"""Length of the sequence that paged attention is checked with when an engine is made."""
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference from the model's own attention in the probe, relative to the largest logit. A model
whose attention is something else differs by about 1."""


def engine_model(model: PreTrainedModel | Path | str, *, dtype: DType = "float32") -> PreTrainedModel:
    """A copy of `model` for an engine to own, or a model read from a Hugging Face folder.

    The copy has weights of its own: training `model` does not change it. The global random state stays as it
    was, although building a module draws initial weights.

    Raises:
        EngineError: the folder does not hold a causal language model.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if isinstance(model, (Path, str)):
        try:
            return AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            raise EngineError(f"no model can be read from {model}: {error}") from error
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
    fresh.load_state_dict(model.state_dict())
    return fresh


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Parameters of the model's dtype in `dtype`; what it keeps in float32 (rotary frequencies) stays there."""
    own = model.dtype
    for parameter in model.parameters():
        if own != dtype and parameter.dtype == own:
            parameter.data = parameter.data.to(dtype)
    return model


class Runner:
    """Runs packed forward passes of one model over a paged cache.

    Args:
        model: becomes the runner's own: its attention is replaced, gradients and training mode are off.
        num_blocks, block_tokens: size of the cache.
        dtype: of weights and cache.
        context_length: longest sequence that will be run; None: as long as the model can.

    Raises:
        EngineError: the model is not one whose layers all do full causal attention over a standard KV cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        context_length: int | None = None,
    ) -> None:
        check_config(model.config, context_length=context_length)
        self.device = device
        self.model = _cast(model, dtype).to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self.name = type(model).__name__
        self.config = model.config.get_text_config()
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr]
        self.num_layers = int(self.config.num_hidden_layers)
        self.heads = int(self.config.num_attention_heads)
        shapes = self._measure()
        self.cache = PagedCache(shapes, num_blocks=num_blocks, block_tokens=block_tokens, dtype=dtype, device=device)
        self._key_elements = max(2 * shape.heads * shape.width for shape in shapes)
        self._min_queries = max(query_rows(shape.width, self.heads // shape.heads) for shape in shapes)
        self._probe(dtype, context_length or self.context_length)
        self._shapes: dict[str, torch.Size] = {}

    def free_weights(self) -> None:
        """Give up the memory of every parameter; their values are lost."""
        self._shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)

    def allocate_weights(self) -> None:
        """Take it back, with arbitrary values."""
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.new_empty(self._shapes[name])

    @property
    def context_length(self) -> int | None:
        """The model's own limit in tokens; None when its config names none."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    def forward(self, chunks: list[Chunk], table: NDArray[np.int64]) -> Tensor:
        """Compute the chunks' tokens; returns the logits after the last token of each drawing chunk.

        Args:
            chunks: at least one.
            table: the scheduler's block table, `[max_running, blocks]`.

        Returns:
            `[drawing chunks, vocabulary]`, in the order of `chunks`; no rows when none draws.
        """
        tokens: list[int] = []
        for seq, start, end, _ in chunks:
            tokens += seq.tokens[start:end]
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        counts = np.array([chunk.end for chunk in chunks], dtype=np.int64) - starts
        rows = np.array([chunk.seq.row for chunk in chunks], dtype=np.int64)
        draws = np.array([chunk.draws for chunk in chunks], dtype=np.bool_)
        last = (np.cumsum(counts) - 1)[draws]
        return self._run(np.array(tokens, dtype=np.int64), table[rows], starts, counts, last)

    @torch.inference_mode()
    def _run(
        self,
        tokens: NDArray[np.int64],
        table: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        last: NDArray[np.int64],
    ) -> Tensor:
        """One forward pass over packed `tokens`; `table`, `starts`, `counts` are per sequence."""
        size, block_tokens = len(tokens), self.cache.block_tokens
        padded = -(-size // ROWS) * ROWS
        owner = np.repeat(np.arange(len(counts)), counts)
        positions = np.zeros(padded, dtype=np.int64)
        positions[:size] = np.arange(size) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        slots = np.zeros(padded, dtype=np.int64)
        block = table[owner, positions[:size] // block_tokens]
        slots[:size] = block * block_tokens + positions[:size] % block_tokens
        ids = np.zeros(padded, dtype=np.int64)
        ids[:size] = tokens
        wanted = np.zeros(-(-max(len(last), 1) // ROWS) * ROWS, dtype=np.int64)
        wanted[: len(last)] = last
        context = ForwardContext(
            cache=self.cache,
            slots=self._tensor(slots),
            tiles=plan_tiles(
                table,
                starts,
                counts,
                block_tokens=block_tokens,
                heads=self.heads,
                key_elements=self._key_elements,
                min_queries=self._min_queries,
                device=self.device,
            ),
            layers=[],
        )
        output = self.model(
            input_ids=self._tensor(ids)[None],
            position_ids=self._tensor(positions)[None],
            use_cache=False,
            logits_to_keep=self._tensor(wanted),
            **{CONTEXT: context},
        )
        if context.layers != list(range(self.num_layers)):
            raise EngineError(
                f"{self.name} has {self.num_layers} layers, but those that attended were {context.layers}: "
                "the others keep no standard KV cache",
                hint="use an SGLang engine for this model",
            )
        return output.logits[0, : len(last)]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @torch.inference_mode()
    def _measure(self) -> list[KVShape]:
        """What each layer hands to its attention, found by running it on one token."""
        seen: dict[int, KVShape] = {}
        self.model.set_attn_implementation(ATTENTION)
        one = torch.ones(1, 1, dtype=torch.long, device=self.device)
        try:
            self.model(input_ids=one, position_ids=one * 0, use_cache=False, **{CONTEXT: seen})
        except (EngineError, TypeError, AttributeError, KeyError) as error:
            raise refusal(self.name, f"does not work with paged attention ({error})") from error
        if sorted(seen) != list(range(self.num_layers)):
            raise refusal(self.name, f"has {self.num_layers} layers, of which {sorted(seen)} keep keys and values")
        return [seen[layer] for layer in range(self.num_layers)]

    @torch.inference_mode()
    def _probe(self, dtype: torch.dtype, longest: int | None) -> None:
        """Compare paged attention, in two chunks, with the model's own on a short sequence, then clear up."""
        size = min(PROBE_TOKENS, longest or PROBE_TOKENS)
        tokens = np.arange(1, size + 1, dtype=np.int64) * 7919 % self.vocab_size
        self.model.set_attn_implementation("eager")
        own = self.model(input_ids=self._tensor(tokens)[None], use_cache=False).logits[0]
        self.model.set_attn_implementation(ATTENTION)
        table = np.arange(1, -(-size // self.cache.block_tokens) + 1)[None]
        pieces = (slice(0, size // 2), slice(size // 2, size))
        try:
            paged = torch.cat(
                [
                    self._run(
                        tokens[piece],
                        table,
                        np.array([piece.start]),
                        np.array([piece.stop - piece.start]),
                        np.arange(piece.stop - piece.start),
                    )
                    for piece in pieces
                ]
            )
        except (EngineError, TypeError, AttributeError, KeyError) as error:
            raise refusal(self.name, f"does not work with paged attention ({error})") from error
        error = float((paged.float() - own.float()).abs().max() / own.float().abs().max().clamp_min(1e-6))
        if not error <= PROBE_TOLERANCE.get(dtype, 0.1):
            raise refusal(self.name, f"differs from itself by {error:.2g} of the largest logit when attention is paged")
        for layer in self.cache.layers:
            layer.zero_()
