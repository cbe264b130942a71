"""Saved and loaded, a trainer goes on bit for bit; another architecture is named."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import make_samples, ratio_loss, scratch

from sluice.config.train import OptimizerConfig, TrainConfig
from sluice.errors import CheckpointError
from sluice.models.build import load_tokenizer
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import Normaliser

torch.set_num_threads(1)
OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=1, weight_decay=0.01)


def _trainer(folder: Path, dtype: str = "float32", **changes: Any) -> TorchTrainer:
    config = TrainConfig.model_validate({"micro_batch_tokens": 64, "dtype": dtype, "optimizer": OPTIMIZER, **changes})
    return TorchTrainer(config, folder, total_steps=6, seed=0)


def _steps(trainer: TorchTrainer, first: int, last: int) -> list[float]:
    results = []
    for number in range(first, last):
        batch = make_batch(make_samples((12, 30, 7), seed=number), budget=64, normaliser=Normaliser.TOKEN)
        stats = trainer.step(batch, ratio_loss)
        results += [stats.loss, stats.grad_norm, stats.lr]
    return results


def _save(trainer: TorchTrainer, folder: Path) -> tuple[Path, Path]:
    model, state = folder / "model", folder / "trainer"
    model.mkdir(parents=True)
    state.mkdir()
    trainer.save_model(model)
    trainer.save_state(state)
    return model, state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("done", [0, 2])
def test_resumed_equals_uninterrupted(tmp_path: Path, dtype: str, done: int) -> None:
    folder = scratch(tmp_path / "initial")
    whole = _trainer(folder, dtype)
    _steps(whole, 0, done)
    expected = _steps(whole, done, 5)

    first = _trainer(folder, dtype)
    _steps(first, 0, done)
    model, state = _save(first, tmp_path / "checkpoint")
    drawn = torch.rand(3)
    second = _trainer(folder, dtype)
    second.load_state(model, state)
    assert torch.equal(torch.rand(3), drawn)
    assert _steps(second, done, 5) == expected
    for (name, a), (_, b) in zip(whole.named_weights(), second.named_weights(), strict=True):
        assert torch.equal(a, b), name


def test_reference_stays_the_initial_weights_after_resume(tmp_path: Path) -> None:
    folder = scratch(tmp_path / "initial")
    samples = make_samples((12, 9))
    trainer = _trainer(folder)
    before = trainer.score(samples, frozenset({"reference"}))
    _steps(trainer, 0, 2)
    again = _trainer(folder)
    again.load_state(*_save(trainer, tmp_path / "checkpoint"))
    for old, new in zip(before, again.score(samples, frozenset({"reference"})), strict=True):
        assert old["reference"].tolist() == new["reference"].tolist()


def test_saved_model_is_a_whole_folder(tmp_path: Path) -> None:
    folder = scratch(tmp_path / "initial")
    trainer = _trainer(folder)
    _steps(trainer, 0, 1)
    model, _ = _save(trainer, tmp_path / "checkpoint")
    assert load_tokenizer(model).encode("1 2") == load_tokenizer(folder).encode("1 2")
    fresh = _trainer(model)
    for (name, a), (_, b) in zip(trainer.named_weights(), fresh.named_weights(), strict=True):
        assert torch.equal(a, b), name


def test_another_architecture_is_named(tmp_path: Path) -> None:
    model, state = _save(_trainer(scratch(tmp_path / "a")), tmp_path / "checkpoint")
    wider = _trainer(scratch(tmp_path / "b", intermediate_size=64))
    with pytest.raises(CheckpointError, match="intermediate_size is 48, that of this run is 64"):
        wider.load_state(model, state)
    llama = _trainer(scratch(tmp_path / "c", model_type="llama"))
    with pytest.raises(CheckpointError, match="model_type is 'qwen3', that of this run is 'llama'"):
        llama.load_state(model, state)


def test_torn_state(tmp_path: Path) -> None:
    folder = scratch(tmp_path / "a")
    trainer = _trainer(folder)
    _steps(trainer, 0, 1)
    model, state = _save(trainer, tmp_path / "checkpoint")
    before = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    (state / "trainer.json").write_text(json.dumps({"steps_done": 0}))
    with pytest.raises(CheckpointError, match=r"optimizer state exp_avg/.*not expected"):
        trainer.load_state(model, state)
    with pytest.raises(CheckpointError, match=r"optimizer state exp_avg/.*not expected|master/"):
        _trainer(folder, "bfloat16").load_state(model, state)
    (state / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer.load_state(model, state)
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer.load_state(model, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.named_weights())


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16"}, {"lora": {"rank": 2}}], ids=["float32", "bfloat16", "lora"]
)
def test_a_snapshot_written_later_is_the_moment_it_was_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Steps, random numbers, a load into the trainer: none of it is in what is written afterwards."""
    trainer = _trainer(scratch(tmp_path / "initial"), **changes)
    _steps(trainer, 0, 2)
    at_once, later = tmp_path / "at-once", tmp_path / "later"
    model, state = _save(trainer, at_once)
    taken = trainer.snapshot()
    _steps(trainer, 2, 4)
    torch.rand(5)
    trainer.offload()
    for part, write in (("model", taken.model), ("trainer", taken.state)):
        (later / part).mkdir(parents=True)
        writing = threading.Thread(target=write, args=(later / part,))
        writing.start()
        _steps(trainer, 4, 5)
        writing.join(60)
        assert not writing.is_alive()
    assert _files(later) == _files(at_once)
    trainer.load_state(model, state)
    assert _files(_save(trainer, tmp_path / "again")[1]) == _files(state)


def test_without_a_copy_a_snapshot_on_a_cpu_takes_no_memory(tmp_path: Path) -> None:
    """Its tensors are the trainer's: what is trained before it is written, is written."""
    trainer = _trainer(scratch(tmp_path / "initial"))
    _steps(trainer, 0, 1)
    taken = trainer.snapshot(copy=False)
    _steps(trainer, 1, 2)
    (tmp_path / "model").mkdir()
    taken.model(tmp_path / "model")
    model, _ = _save(trainer, tmp_path / "now")
    assert _files(tmp_path / "model") == _files(model)
