"""Models that Megatron cannot train: what is wrong is named before anything is allocated, and every rank ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.integration.megatron_rig import settings, tiny
from tests.integration.test_bad_input import saved
from tests.tiny import tiny as run_of

from sluice.errors import SluiceError
from sluice.train.backends.megatron.admission import admitted
from sluice.train.ranks.crew import ProcessCrew
from sluice.train.ranks.spec import RankSpec
from sluice.train.ranks.trainer import RankedTrainer

pytestmark = [pytest.mark.timeout(200)]
Tensors = dict[str, torch.Tensor]
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("good"), "qwen3")


def changed(good: Path, folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """A copy whose config.json and tensors say something else; None takes a tensor out."""
    shutil.copytree(good, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors:
        held: dict[str, Any] = {**load_file(folder / "model.safetensors"), **tensors}
        kept = {name: tensor for name, tensor in held.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def unfit(model: Path, ranks: int, layout: dict[str, Any], **frozen: Path) -> str:
    """What a rank says before it meets the others."""
    config = settings(ranks, layout)
    with pytest.raises(SluiceError) as caught:
        admitted(RankSpec(0, ranks, "nowhere", config, model, 1, 0, "cpu", frozen))
    return str(caught.value)


def refused(model: Path, folder: Path, ranks: int, layout: dict[str, Any]) -> str:
    """What the trainer says. Its ranks never came to megatron-core, which builds the model, and have ended."""
    crew = ProcessCrew(ranks, folder / "logs", [{"OMP_NUM_THREADS": "1"}] * ranks)
    began = list(crew.pids)
    watched = [psutil.Process(pid) for pid in began]
    with pytest.raises(SluiceError) as caught:
        RankedTrainer(
            crew, settings(ranks, layout, rank_seconds=60), model, total_steps=1, seed=0, devices=["cpu"] * ranks,
            scratch=folder / "scratch", threads=1,
        )  # fmt: skip
    gone, alive = psutil.wait_procs(watched, timeout=20)
    assert len(gone) == ranks, alive
    assert not any("megatron/core" in log.read_text() for log in (folder / "logs").rglob("*") if log.is_file())
    return str(caught.value)


ROPE = {"rope_type": "spiral", "rope_theta": 1e4}
Case = tuple[str, dict[str, Any], dict[str, Any] | None, int, dict[str, Any], tuple[str, ...]]
CASES: list[Case] = [
    ("heads", {"num_attention_heads": 3, "num_key_value_heads": 3}, None, 2, {"tp": 2},
     ("train.megatron.tp = 2", "num_attention_heads = 3")),
    ("vocabulary", {"vocab_size": 51}, None, 2, {"tp": 2}, ("train.megatron.tp = 2", "vocab_size = 51")),
    ("layers", {}, None, 3, {"pp": 3}, ("train.megatron.pp = 3", "num_hidden_layers = 4")),
    ("stages", {}, None, 2, {"pp": 2, "vpp": 4}, ("pp × vpp = 2 × 4", "num_hidden_layers = 4")),
    ("rope", {"rope_parameters": ROPE}, None, 1, {}, ("rope_parameters.rope_type = 'spiral'",)),
    ("family", {"model_type": "mistral"}, None, 2, {}, ("model_type 'mistral'", "qwen3")),
    ("missing", {}, {NORM: None}, 2, {"tp": 2}, ("lack 1 tensors", NORM)),
    ("extra", {}, {"model.layers.9.w": torch.zeros(2)}, 2, {"pp": 2}, ("does not know model.layers.9.w [2]",)),
    ("shape", {}, {NORM: torch.zeros(31)}, 1, {}, (f"{NORM} in", "is [31]", "makes it [32]")),
    ("numbers", {}, {NORM: torch.zeros(32, dtype=torch.int8)}, 1, {}, (NORM, "I8 numbers")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_it_is_named(good: Path, tmp_path: Path, case: Case) -> None:
    _, config, tensors, ranks, layout, said = case
    message = unfit(changed(good, tmp_path / "model", config, tensors), ranks, layout)
    assert all(part in message for part in said), message


FROZEN: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
    ({"rms_norm_eps": 0.5}, None, "has eps = 0.5, and the trained model has"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, None, "has rope_parameters = {"),
    ({}, {NORM: None}, NORM),
]


@pytest.mark.parametrize(("config", "tensors", "said"), FROZEN, ids=["sizes", "rotary", "tensors"])
def test_a_frozen_policy_of_another_architecture_is_named(
    good: Path, tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any] | None, said: str
) -> None:
    other = changed(good, tmp_path / "teacher", config, tensors)
    message = unfit(good, 1, {}, teacher=other)
    assert said in message
    assert str(other) in message


def test_an_optimizer_in_host_memory_needs_an_accelerator(good: Path) -> None:
    assert "train.megatron.offload_optimizer = 0.5" in unfit(good, 1, {"offload_optimizer": 0.5})


@pytest.mark.parametrize("name", ["missing", "layers"])
def test_every_rank_ends_and_none_came_to_build_the_model(good: Path, tmp_path: Path, name: str) -> None:
    _, config, tensors, ranks, layout, said = next(case for case in CASES if case[0] == name)
    message = refused(changed(good, tmp_path / "model", config, tensors), tmp_path, ranks, layout)
    assert all(part in message for part in said), message


def test_it_is_the_last_thing_that_a_run_prints(good: Path, tmp_path: Path) -> None:
    """From the shell: exit code and text. Nothing of a rank's traceback is there."""
    train = {"backend": "megatron", "ranks": 3, "megatron": {"pp": 3}}
    recipe = saved(run_of(tmp_path), tmp_path, model={"path": str(good), "scratch": None}, train=train)
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = " ".join(done.stderr.rpartition("error: ")[2].split())
    assert "train.megatron.pp = 3 does not divide the model's num_hidden_layers = 4" in last
    assert last.endswith("pp × vpp may be 1, 2, 4")
