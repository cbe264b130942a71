"""A model folder in another precision: what must stay exact does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from family_cases import family
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sluice.models.convert import convert_model, set_turn_ends


def test_a_routers_correction_stays_float32(tmp_path: Path) -> None:
    source = family(tmp_path / "source", "glm4_moe")
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if name.endswith("e_score_correction_bias"))
    weights[name] = torch.linspace(0.1, 0.7, len(weights[name]))
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    target = tmp_path / "target"
    target.mkdir()
    convert_model(source, target, dtype="bfloat16")
    got = load_file(target / "model.safetensors")
    assert got.pop(name).equal(weights.pop(name))
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert loaded[name].dtype == torch.float32, "as transformers keeps it"


def test_turn_ends_are_added_to_those_of_the_model(tmp_path: Path) -> None:
    folder = family(tmp_path / "model", "qwen3")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 5, "temperature": 0.6, "do_sample": True}))
    set_turn_ends(folder, (7, 5))
    content = json.loads(file.read_text())
    assert (content["eos_token_id"], content["temperature"]) == ([5, 7], 0.6)
    file.unlink()
    set_turn_ends(folder, (1,))
    assert json.loads(file.read_text())["eos_token_id"] == 1
