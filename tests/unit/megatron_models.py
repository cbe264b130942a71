"""Tiny models of the families that the Megatron backend builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 16},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3, tied": {"tie_word_embeddings": True, "head_dim": 6},
    "qwen3, a group": {"num_key_value_heads": 8, "head_dim": 4},
    "glm4": {"head_dim": 8},
    "glm4, no bias": {"head_dim": 12, "attention_bias": False},
    "glm4, tied": {"head_dim": 4, "tie_word_embeddings": True},
    "glm": {"head_dim": 8},
}


def config_of(variant: str, **changes: Any) -> Any:
    return CONFIG_MAPPING[variant.split(",")[0]](**{**SIZES, **VARIANTS.get(variant, {}), **changes})


def folder_of(variant: str, folder: Path, *, dtype: torch.dtype = torch.float32, shards: str = "5GB") -> Path:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config_of(variant))
    for parameter in model.parameters():  # norms begin as ones, biases as zeros
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder
