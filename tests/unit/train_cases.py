"""Small models and batches that the trainer's tests share, and an independent padded implementation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from sluice.config.model import ScratchConfig, TokenizerConfig
from sluice.models.build import make_scratch
from sluice.types import STREAMS, LossInputs, LossOutput, TrainSample, Version

WORDS = (*"abcdefghij", *"0123456789", "+", "=")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large, so that a leak between samples cannot hide in rounding
}


def scratch(folder: Path, *, seed: int = 0, **architecture: Any) -> Path:
    """A tiny model in `folder`: Qwen3 with a tied head unless told otherwise."""
    given = {"model_type": "qwen3", "tie_word_embeddings": True, **SHAPE, **architecture}
    if given["model_type"] in ("qwen2", "granite", "cohere"):
        del given["head_dim"]  # there it follows from the other sizes
    make_scratch(
        ScratchConfig(architecture=given, tokenizer=TokenizerConfig(words=WORDS, chat_template=TEMPLATE)),
        folder,
        seed=seed,
    )
    return folder


def make_samples(lengths: Sequence[int], *, seed: int = 0, temperature: float = 0.8) -> list[TrainSample]:
    """Samples with random ids, a random third of the later tokens trained, random behaviour and advantage.

    Every second pair shares an episode.
    """
    rng = np.random.default_rng(seed)
    samples: list[TrainSample] = []
    for number, length in enumerate(lengths):
        trained = rng.random(length) < 0.6
        trained[0] = False
        trained[-1] = True
        streams = {name: np.full(length, fill, dtype=dtype) for name, (dtype, fill) in STREAMS.items()}
        del streams["proximal"], streams["reference"], streams["value"]
        streams["weight"][trained] = 1.0
        streams["temperature"][trained] = temperature
        streams["version"][trained] = Version(3).code
        streams["behaviour"][trained] = -rng.random(int(trained.sum())) * 3
        streams["advantage"][:] = np.where(trained, rng.normal(), 0.0)
        episode = f"e{number // 2}"
        ids = rng.integers(5, 40, length).astype(np.int32)
        samples.append(TrainSample(episode, f"g{number // 4}", number % 2, ids, streams))
    return samples


def ratio_loss(inputs: LossInputs) -> LossOutput:
    """-A · ratio, and metrics that differ between tokens."""
    advantage = inputs.streams["advantage"].to(inputs.logprobs.dtype)
    ratio = (inputs.logprobs - inputs.streams["behaviour"]).exp()
    return LossOutput(-advantage * ratio, {"ratio": ratio.detach(), "entropy": inputs.entropy})


def padded_logprobs(model: Any, samples: Sequence[TrainSample]) -> list[torch.Tensor]:
    """Log-probs of every token but the first by one padded forward pass of plain transformers, `[length]`."""
    longest = max(len(sample) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    temperature = torch.ones(len(samples), longest)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.from_numpy(sample.ids.astype(np.int64))
        mask[row, : len(sample)] = 1
        temperature[row, : len(sample)] = torch.from_numpy(sample["temperature"])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / temperature[:, 1:, None]
    chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    chosen = torch.nn.functional.pad(chosen, (1, 0))
    return [chosen[row, : len(sample)] for row, sample in enumerate(samples)]


def plain_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model as transformers loads it, without anything of Sluice's."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
