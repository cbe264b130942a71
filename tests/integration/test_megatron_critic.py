"""A critic over Megatron's ranks is the torch backend's critic in one process, in every layout, and reads its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.integration.megatron_rig import OPTIMIZER, Rig, cases, tiny
from tests.unit.train_cases import make_samples

from sluice.algos.ppo import PPO
from sluice.config.critic import CriticConfig, PPOConfig
from sluice.config.train import TrainConfig
from sluice.errors import CheckpointError
from sluice.train.backends.critic import TorchCritic
from sluice.train.base import Critic, CriticStats
from sluice.train.packing import make_batch
from sluice.train.ranks.critic import RankedCritic
from sluice.types import Normaliser, TrainBatch, TrainSample

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(200)
LENGTHS = (12, 30, 7, 7, 25, 32, 2, 18)
CONFIG = CriticConfig.model_validate({"optimizer": OPTIMIZER})
LOSS = PPO(PPOConfig()).value_loss
STEPS = 4
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}), (2, {"tp": 2}), (2, {"tp": 2, "sequence_parallel": False}), (2, {"pp": 2, "vpp": 2}), (2, {"cp": 2}),
    (4, {"tp": 2, "pp": 2}), (4, {"tp": 2, "cp": 2}), (4, {"pp": 2}),
]  # fmt: skip


def samples(seed: int = 0) -> list[TrainSample]:
    rng = np.random.default_rng(seed + 100)
    return [
        sample.with_streams(value=rng.normal(size=len(sample)), **{"return": rng.normal(size=len(sample))})
        for sample in make_samples(LENGTHS, seed=seed)
    ]


def batch(seed: int) -> TrainBatch:
    return make_batch(samples(seed), budget=64, normaliser=Normaliser.TOKEN)


def alone(model: Path) -> TorchCritic:
    return TorchCritic(CONFIG, TrainConfig(micro_batch_tokens=64), model, total_steps=10)


def same(ours: Critic, theirs: Critic, first: int, last: int) -> None:
    for seed in range(first, last):
        found, wanted = ours.step(batch(seed), LOSS), theirs.step(batch(seed), LOSS)
        np.testing.assert_allclose(
            [found.loss, found.grad_norm, found.lr], [wanted.loss, wanted.grad_norm, wanted.lr], rtol=1e-5
        )
        assert found.metrics.keys() == wanted.metrics.keys()
        for name, value in wanted.metrics.items():
            edge = 2 / sum(LENGTHS) if name == "clip_fraction" else 0  # a value on the edge may fall to either side
            np.testing.assert_allclose(found.metrics[name], value, rtol=1e-5, atol=edge, err_msg=name)
    for mine, other in zip(ours.score(samples()), theirs.score(samples()), strict=True):
        assert mine.key == other.key
        assert other["value"].any()
        np.testing.assert_allclose(mine["value"], other["value"], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("critic") / "model", "qwen3")


@pytest.mark.parametrize(("ranks", "layout"), cases(LAYOUTS, quick=(LAYOUTS[0], LAYOUTS[3], LAYOUTS[6])))
def test_values_and_updates_are_those_of_one_process(
    megatron: Rig, model: Path, ranks: int, layout: dict[str, Any]
) -> None:
    with megatron.trainer(ranks, model, layout) as trainer:
        critic = RankedCritic(trainer.replicas, CONFIG, total_steps=10)
        assert not any(sample["value"].any() for sample in critic.score(samples()))
        same(critic, alone(model), 0, STEPS)
        empty = critic.step(TrainBatch(()), LOSS)
        assert empty == CriticStats(0.0, 0.0, empty.lr, {})
        assert empty.lr > 0


def test_its_state_goes_on_in_another_layout_and_in_the_other_backend(
    megatron: Rig, model: Path, tmp_path: Path
) -> None:
    theirs = alone(model)
    with megatron.trainer(2, model, {"pp": 2}) as trainer:
        critic = RankedCritic(trainer.replicas, CONFIG, total_steps=10)
        same(critic, theirs, 0, 2)
        critic.save_state(tmp_path / "pipeline")
    theirs.save_state(tmp_path / "torch")
    for number, saved in enumerate(("pipeline", "torch")):
        with megatron.trainer(4, model, {"tp": 2, "cp": 2}) as trainer:
            critic = RankedCritic(trainer.replicas, CONFIG, total_steps=10)
            critic.load_state(tmp_path / saved)
            other = alone(model)
            other.load_state(tmp_path / saved)
            same(critic, other, 2 + number, 4)
    (tmp_path / "pipeline" / "optimizer-00002-of-00002.safetensors").unlink()
    with megatron.trainer(1, model, {}) as trainer:
        critic = RankedCritic(trainer.replicas, CONFIG, total_steps=10)
        with pytest.raises(CheckpointError, match="1 of its 2 files"):
            critic.load_state(tmp_path / "pipeline")
