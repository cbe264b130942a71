"""Models of random weights in the shapes of known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from benchmarks.rig import say
from transformers import AutoModelForCausalLM, Qwen3Config

from sluice import device


def qwen3(hidden: int, layers: int, heads: int, groups: int, ffn: int, *, tied: bool, **further: Any) -> Qwen3Config:
    """A Qwen3 of the given sizes, with the vocabulary and heads of the released ones."""
    sizes = {"head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 131_072, **further}
    return Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=ffn, tie_word_embeddings=tied, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, **sizes,
    )  # fmt: skip


SHAPES = {
    "tiny": qwen3(64, 2, 4, 2, 192, tied=True, head_dim=16, vocab_size=512),
    "30m": qwen3(512, 8, 8, 2, 1536, tied=True, head_dim=64, vocab_size=16_384),
    "qwen3-0.6b": qwen3(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-4b": qwen3(2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": qwen3(4096, 36, 32, 8, 12_288, tied=False),
}


def write_model(name: str, folder: Path) -> None:
    """A Hugging Face folder of bfloat16 weights, made where there is an accelerator on it."""
    say(f"random weights in the shape of {name}")
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    device.free_cached(device.resolve("auto"))


def parameters(name: str) -> tuple[int, int]:
    """How many a shape has, and how many of them multiply every token: all but an embedding that is not the head."""
    config = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    whole = sum(each.numel() for each in model.parameters())
    return whole, whole - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
