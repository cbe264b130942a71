"""Adapters: at first they change nothing, alone they are trained, and what leaves the trainer is merged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from family_cases import family
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.tiny import tiny
from train_cases import make_samples, padded_logprobs, plain_model, ratio_loss, scratch
from transformers import AutoModelForCausalLM

from sluice.config.train import TrainConfig
from sluice.errors import CheckpointError, ConfigError, SluiceError, TrainError
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import Normaliser

torch.set_num_threads(1)
LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0}
SAMPLES = make_samples((12, 30, 7))


def _trainer(folder: Path, lora: dict[str, Any] | None = LORA, **changes: Any) -> TorchTrainer:
    given = {"micro_batch_tokens": 64, "lora": lora, "optimizer": {"lr": 1e-2, "weight_decay": 0.01}, **changes}
    return TorchTrainer(TrainConfig.model_validate(given), folder, total_steps=6, seed=0)


def _batch(seed: int = 0):
    return make_batch(make_samples((12, 30, 7), seed=seed), budget=64, normaliser=Normaliser.TOKEN)


def _scores(trainer: TorchTrainer, stream: str) -> list[torch.Tensor]:
    return [torch.from_numpy(sample[stream]) for sample in trainer.score(SAMPLES, frozenset({stream}))]


@pytest.fixture(params=["qwen3", "llama", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return family(tmp_path / "initial", request.param)


def _some(folder: Path) -> dict[str, Any]:
    """Layers of attention, where a mixture of experts asks for a choice."""
    return {**LORA, "target_modules": ["o_proj"]} if "deepseek" in (folder / "config.json").read_text() else LORA


def test_a_fresh_adapter_changes_nothing(folder: Path) -> None:
    with_adapter, without = _trainer(folder, _some(folder)), _trainer(folder, None)
    for ours, theirs in zip(_scores(with_adapter, "proximal"), _scores(without, "proximal"), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = dict(with_adapter.named_weights()), dict(without.named_weights())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_adapters_have_gradients_and_move(folder: Path) -> None:
    trainer = _trainer(folder, _some(folder))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    gradients = trainer.gradients(_batch(), ratio_loss)
    assert gradients
    assert all(".lora_A." in name or ".lora_B." in name for name in gradients)
    for number in range(2):
        trainer.step(_batch(number), ratio_loss)
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == gradients.keys()


def _name(of_peft: str) -> str:
    """Of a parameter in the trainer."""
    return of_peft.removeprefix("base_model.model.").replace(".default.", ".policy.")


def _of_peft(folder: Path, trainer: TorchTrainer) -> Any:
    """peft's own model on plain transformers, with the trainer's adapters."""
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    theirs: Any = peft.get_peft_model(plain_model(folder, torch.float32), settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(trainer.model.get_parameter(_name(name)))
    return theirs


def test_gradients_are_those_of_peft_on_plain_transformers(tmp_path: Path) -> None:
    folder = scratch(tmp_path / "initial")
    trainer = _trainer(folder)
    trainer.step(_batch(), ratio_loss)  # else B is zero, and so is the gradient of A
    ours = trainer.gradients(_batch(1), ratio_loss)
    theirs = _of_peft(folder, trainer)
    samples = make_samples((12, 30, 7), seed=1)
    total = sum(sample.num_trained_tokens for sample in samples)
    loss = torch.zeros(())
    for sample, logprobs in zip(samples, padded_logprobs(theirs, samples), strict=True):
        ratio = (logprobs - torch.from_numpy(sample["behaviour"])).exp()
        trained = torch.from_numpy(sample["weight"]) > 0
        loss = loss - (torch.from_numpy(sample["advantage"]) * ratio)[trained].sum() / total
    loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(expected) == len(ours)
    for name, gradient in expected.items():
        got = ours[_name(name)]
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)


def test_what_leaves_the_trainer_is_pefts_own_merge(tmp_path: Path) -> None:
    folder = scratch(tmp_path / "initial")
    trainer = _trainer(folder)
    for number in range(3):
        trainer.step(_batch(number), ratio_loss)
    theirs = _of_peft(folder, trainer)
    merged = theirs.merge_and_unload().state_dict()
    published = dict(trainer.named_weights())
    assert published.keys() == load_file(folder / "model.safetensors").keys(), "nothing of adapters in the names"
    assert all(torch.equal(merged[name], tensor) for name, tensor in published.items())
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)
    alone: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ours = _scores(trainer, "proximal")
    for sample, got, expected in zip(SAMPLES, ours, padded_logprobs(alone, SAMPLES), strict=True):
        sampled = torch.from_numpy(sample["weight"]) > 0
        torch.testing.assert_close(got[sampled], expected[sampled], rtol=0, atol=1e-5)


def test_the_reference_is_the_model_without_adapters(tmp_path: Path) -> None:
    folder = scratch(tmp_path / "initial")
    trainer, full = _trainer(folder), _trainer(folder, None)
    trainer.step(_batch(), ratio_loss)
    for ours, theirs in zip(_scores(trainer, "reference"), _scores(full, "reference"), strict=True):
        assert torch.equal(ours, theirs)
    changed = zip(_scores(trainer, "proximal"), _scores(trainer, "reference"), strict=True)
    assert any(not torch.equal(now, first) for now, first in changed)
    assert trainer.gradients(_batch(1), ratio_loss), "they are on again"


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("done", [0, 2])
def test_resumed_equals_uninterrupted(tmp_path: Path, done: int, changes: dict[str, Any]) -> None:
    folder = scratch(tmp_path / "initial")
    first = _trainer(folder, **changes)
    for number in range(done):
        first.step(_batch(number), ratio_loss)
    first.save_model(tmp_path / "model")
    first.save_state(tmp_path / "trainer")
    expected = [first.step(_batch(number), ratio_loss) for number in range(done, 5)]
    second = _trainer(folder, **changes)
    second.step(_batch(9), ratio_loss)
    second.load_state(tmp_path / "model", tmp_path / "trainer")
    assert [second.step(_batch(number), ratio_loss) for number in range(done, 5)] == expected
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first.named_weights(), second.named_weights(), strict=True))


def test_another_base_or_other_adapters_are_refused(tmp_path: Path) -> None:
    trainer = _trainer(scratch(tmp_path / "initial"))
    trainer.step(_batch(), ratio_loss)
    trainer.save_model(tmp_path / "model")
    trainer.save_state(tmp_path / "trainer")
    with pytest.raises(CheckpointError, match="is not that of the run's first model"):
        _trainer(scratch(tmp_path / "other", seed=1)).load_state(tmp_path / "model", tmp_path / "trainer")
    with pytest.raises(CheckpointError, match="this trainer wants"):
        _trainer(tmp_path / "initial", {**LORA, "rank": 2}).load_state(tmp_path / "model", tmp_path / "trainer")


@pytest.mark.parametrize(
    ("name", "targets", "error", "told"),
    [
        ("qwen3", ["q_prj"], ConfigError, r"no linear layer 'q_prj' .*\n.*there are: .*q_proj"),
        ("llama", ["lm_head"], ConfigError, "no linear layer 'lm_head' besides its head"),
        ("qwen3_moe", [], TrainError, r"experts of Qwen3MoeForCausalLM are one stack of matrices, model\.layers"),
    ],
)
def test_layers_that_cannot_have_one(
    tmp_path: Path, name: str, targets: list[str], error: type[SluiceError], told: str
) -> None:
    with pytest.raises(error, match=told):
        _trainer(family(tmp_path / "initial", name), {**LORA, "target_modules": targets})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": "bfloat16"}, "an adapter's share would be rounded away"),
        ({"ranks": 2}, "train.lora trains on one rank"),
        ({"routing_replay": True}, "train.lora with train.routing_replay"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        TrainConfig.model_validate({"lora": LORA, **changes})


def test_a_critic_has_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="PPO's critic is trained whole"):
        tiny(tmp_path, train={"lora": LORA}, algorithm={"type": "ppo"})


def test_without_peft_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'sluice-rl\[lora\]'"):
        _trainer(scratch(tmp_path / "initial"))
