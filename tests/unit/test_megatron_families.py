"""Weights between folders of transformers and the parts of tensor-parallel ranks, for every family; no Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sluice.models.build import read_config
from sluice.train.backends.megatron.families import Architecture, architecture
from sluice.train.backends.megatron.folder import Reader, whole_tensors

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


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def parts(reader: Reader, model: Architecture, size: int, **how: Any) -> list[dict[str, Tensor]]:
    return [{each.name: reader.part(each, rank, size, **how) for each in model.parameters} for rank in range(size)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_map_covers_what_transformers_has(variant: str) -> None:
    config = config_of(variant)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = [
        (name, shape)
        for each in architecture(config).parameters
        for name, shape in zip(each.tensors, each.shapes, strict=True)
    ]
    assert len(found) == len(dict(found))
    assert dict(found) == expected


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_all_ranks_make_the_folder(variant: str, size: int, tmp_path: Path) -> None:
    folder = folder_of(variant, tmp_path)
    model = architecture(read_config(folder))
    with Reader(folder, model) as reader:
        ranks = parts(reader, model, size)
    made = list(whole_tensors(model.parameters, ranks))
    expected = stored(folder)
    assert [name for name, _ in made] == [name for each in model.parameters for name in each.tensors]
    assert {name for name, _ in made} == expected.keys()
    assert all(torch.equal(tensor, expected[name]) and tensor.is_contiguous() for name, tensor in made)
    if size > 1:  # nothing but norms is held twice
        held = sum(tensor.numel() for rank in ranks for tensor in rank.values())
        norms = sum(each.numel() for name, each in expected.items() if "norm" in name)
        assert held == sum(tensor.numel() for tensor in expected.values()) + (size - 1) * norms
