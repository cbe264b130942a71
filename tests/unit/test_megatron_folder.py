"""Weights between folders of transformers and the parts of tensor-parallel ranks, for every family; no Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_models import VARIANTS, config_of, folder_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from sluice.errors import TrainError
from sluice.models.build import read_config
from sluice.train.backends.megatron.families import Architecture, architecture
from sluice.train.backends.megatron.folder import Reader, named, whole_tensors


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def parts(reader: Reader, model: Architecture, size: int, **how: Any) -> list[dict[str, Tensor]]:
    return [{each.name: reader.part(each, rank, size, **how) for each in model.parameters} for rank in range(size)]


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


@pytest.mark.parametrize("variant", ["llama, tied", "qwen2", "qwen3", "glm4"])
def test_shards_and_other_precisions_are_read(variant: str, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        folder = folder_of(variant, tmp_path / str(dtype), dtype=dtype, shards="20KB")
        expected = stored(folder)
        assert len(list(folder.glob("*.safetensors"))) > 2
        model = architecture(read_config(folder))
        with Reader(folder, model) as reader:
            same = dict(whole_tensors(model.parameters, parts(reader, model, 2, dtype=dtype)))
            wider = dict(whole_tensors(model.parameters, parts(reader, model, 2)))
        assert same.keys() == wider.keys() == expected.keys()
        assert all(torch.equal(same[name], tensor) for name, tensor in expected.items())
        assert all(torch.equal(wider[name], tensor.float()) for name, tensor in expected.items())


def test_a_whole_of_another_shape_is_no_tensor_of_the_checkpoint() -> None:
    head = architecture(config_of("llama")).parameters[-1]
    with pytest.raises(TrainError, match=r"output_layer.weight makes lm_head.weight \[24, 32\], but .* \[48, 32\]"):
        list(named([(head, [torch.zeros(24, 32)])]))


# ── folders that do not fit ────────────────────────────────────────────────────────────────────────────────


def changed(folder: Path, change: Any) -> None:
    """Rewrite the only safetensors file of `folder` after `change` of its tensors."""
    tensors = stored(folder)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def refused(folder: Path) -> str:
    with pytest.raises(TrainError) as caught:
        Reader(folder, architecture(read_config(folder)))
    return str(caught.value)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = folder_of("qwen2", tmp_path)
    changed(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    assert "lack 1 tensors that config.json asks for, first model.layers.1.self_attn.k_proj.bias [16]" in refused(
        folder
    )
    changed(folder, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"))
    assert "lack 2 tensors that config.json asks for, first model.layers.0.mlp.down_proj.weight [32, 40]" in refused(
        folder
    )


def test_a_missing_head_may_be_a_tied_one(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    changed(folder, lambda tensors: tensors.pop("lm_head.weight"))
    message = refused(folder)
    assert "first lm_head.weight [48, 32]" in message
    assert "tie_word_embeddings = true" in message


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_an_unknown_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = folder_of("qwen3", tmp_path)
    changed(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))
    assert f"config.json does not know {name} [4] in {folder / 'model.safetensors'}" in refused(folder)


def test_a_tensor_of_another_shape_is_named_with_the_field(tmp_path: Path) -> None:
    folder = folder_of("glm4", tmp_path)
    name = "model.layers.2.mlp.gate_up_proj.weight"
    changed(folder, lambda tensors: tensors.update({name: torch.zeros(80, 16)}))
    message = refused(folder)
    assert f"{name} in {folder / 'model.safetensors'} is [80, 16], but config.json makes it [80, 32]" in message
    assert "hidden_size = 32" in message


def test_quantized_numbers_are_refused(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    changed(folder, lambda tensors: tensors.update({name: torch.zeros(40, 32, dtype=torch.float8_e4m3fn)}))
    assert f"{name} in {folder / 'model.safetensors'} holds F8_E4M3 numbers" in refused(folder)


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path: Path) -> None:
    folder = folder_of("qwen2, tied", tmp_path)
    changed(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    with Reader(folder, architecture(read_config(folder))):
        pass
    changed(folder, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "lm_head.weight and model.embed_tokens.weight differ" in refused(folder)


def test_inverse_frequencies_are_no_weights(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    changed(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    with Reader(folder, architecture(read_config(folder))):
        pass


def test_a_lost_or_torn_shard_is_named(tmp_path: Path) -> None:
    folder = folder_of("qwen3", tmp_path, shards="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / index["model.layers.1.mlp.up_proj.weight"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"{shard} cannot be read" in refused(folder)
    shard.unlink()
    assert f"{shard} cannot be read" in refused(folder)


def test_a_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    folder = folder_of("qwen3", tmp_path, shards="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / index[name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    assert f"first {name} [40, 32], which the index says is in {shard.name}" in refused(folder)
