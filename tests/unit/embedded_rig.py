"""Tiny real models, a character tokenizer and published versions for the tests of the embedded engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from sluice.config.rollout import EmbeddedConfig
from sluice.rollout.engines.base import GenerateRequest, Generation
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.types import SamplingParams, Version
from sluice.weights.base import Manifest, TensorInfo

torch.set_num_threads(1)

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
V0 = Version(0)


def tiny(kind: str = "qwen3", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model: Qwen3 with tied embeddings, or Llama with separate ones."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "tie_word_embeddings": kind == "qwen3", **changes}
    config = Qwen3Config(**sizes) if kind == "qwen3" else LlamaConfig(**sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def characters() -> PreTrainedTokenizerFast:
    """Token n is the n-th printable character from space on."""
    tokenizer = Tokenizer(models.WordLevel({chr(32 + n): n for n in range(95)} | {"<unk>": 95}, "<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def make(model: PreTrainedModel | None = None, **config: Any) -> EmbeddedEngine:
    sizes = {"kv_tokens": 8192, **config}
    return EmbeddedEngine.from_model(model or tiny(), characters(), EmbeddedConfig(**sizes), version=V0)


def request(rid: str, ids: Any, *, noise: int = 7, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_new_tokens": 16, **sampling})
    return GenerateRequest(rid, np.asarray(ids, dtype=np.int32), params, noise)


def prompts(count: int, *, low: int = 3, high: int = 40, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(low, high)).astype(np.int32) for _ in range(count)]


def run_all(engine: EmbeddedEngine, requests: list[GenerateRequest]) -> list[Generation]:
    """Generate all at once in an event loop of their own."""

    async def both() -> list[Generation]:
        return await asyncio.gather(*(engine.generate(one) for one in requests))

    return asyncio.run(both())


async def until_drawn(engine: EmbeddedEngine, tokens: int) -> None:
    """Let the engine run until it has drawn this many tokens in all."""
    while engine.statistics()["generated_tokens"] < tokens:  # noqa: ASYNC110 - turns of the loop, not time
        await asyncio.sleep(0)


@torch.no_grad()
def reference_logits(model: PreTrainedModel, ids: np.ndarray) -> Tensor:
    """Plain forward pass over one sequence: `[len(ids), vocabulary]`."""
    return model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].float()


def reference_logprobs(
    model: PreTrainedModel, context: np.ndarray, new: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """log-softmax(logits / T) of each of the `new` tokens after `context`."""
    logits = reference_logits(model, np.concatenate([context, new]))[len(context) - 1 : -1]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(1, torch.from_numpy(new.astype(np.int64))[:, None])[:, 0].numpy()


def digest(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.contiguous().numpy().tobytes())


@dataclass
class Publication:
    """A published version in memory. `tensors` may be spoiled after the manifest was made."""

    manifest: Manifest
    content: dict[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.content.items()

    def folder(self) -> Path:
        raise AssertionError("the embedded engine reads tensors, not a folder")


def publish(model: PreTrainedModel, version: Version) -> Publication:
    content = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    infos = {
        name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digest(tensor))
        for name, tensor in content.items()
    }
    size = sum(tensor.nbytes for tensor in content.values())
    return Publication(Manifest(version, None, "checksum", infos, size), content)
