"""What is computed per segment does not depend on how a step is split into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.train_cases import make_samples, scratch

from sluice.algos import make_algorithm
from sluice.config.algos import AlgorithmConfig, CISPOConfig, GRPOConfig, GSPOConfig
from sluice.config.policy_gradient import IcePopConfig, SequenceMaskConfig, TISConfig, VetoConfig
from sluice.config.train import TrainConfig
from sluice.train.backends.torch import TorchTrainer
from sluice.train.base import StepStats
from sluice.train.packing import make_batch
from sluice.types import TrainSample

LENGTHS = [9, 14, 5, 20, 7, 11]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> TorchTrainer:
    return TorchTrainer(TrainConfig(), scratch(tmp_path_factory.mktemp("model")), total_steps=1, seed=0)


def near_the_policy(trainer: TorchTrainer) -> list[TrainSample]:
    """Samples whose behaviour is the model's own policy and some noise, more of it in later samples."""
    draw = np.random.default_rng(1)
    samples: list[TrainSample] = []
    for number, sample in enumerate(trainer.score(make_samples(LENGTHS), frozenset({"proximal"}))):
        noise = draw.normal(size=len(sample)) * 0.1 * (number + 1)
        samples.append(sample.with_streams(behaviour=np.where(sample.trained, sample["proximal"] + noise, 0)))
    return samples


def gradients(
    trainer: TorchTrainer, samples: list[TrainSample], config: AlgorithmConfig, budget: int
) -> Mapping[str, torch.Tensor]:
    algorithm = make_algorithm(config)
    batch = make_batch(samples, budget=budget, normaliser=algorithm.normaliser)
    assert len(batch.micro_batches) == {1000: 1, 30: 3, 20: 4}[budget]
    return trainer.gradients(batch, algorithm.loss)


CONFIGS = [
    GSPOConfig(clip_low=0.02, clip_high=0.02),
    GRPOConfig(sequence_mask=SequenceMaskConfig(low=0.95, high=1.05)),
    GRPOConfig(veto=VetoConfig(low=0.5, high=2)),
    CISPOConfig(tis=TISConfig(), icepop=IcePopConfig(), sequence_mask=SequenceMaskConfig(low=0.9, high=1.1)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_those_of_one_micro_batch(trainer: TorchTrainer, config: AlgorithmConfig) -> None:
    samples = near_the_policy(trainer)
    whole = gradients(trainer, samples, config, 1000)
    size = sum(float((g.double() ** 2).sum()) for g in whole.values()) ** 0.5
    assert size > 1e-3
    for budget in (30, 20):
        split = gradients(trainer, samples, config, budget)
        error = sum(float(((split[name] - g).double() ** 2).sum()) for name, g in whole.items()) ** 0.5
        assert error / size < 1e-5


def test_metrics_are_those_of_one_micro_batch(tmp_path: Path) -> None:
    config = GRPOConfig(
        tis=TISConfig(), icepop=IcePopConfig(), sequence_mask=SequenceMaskConfig(low=0.9, high=1.1), veto=VetoConfig()
    )
    algorithm = make_algorithm(config)

    def step(budget: int) -> StepStats:
        trainer = TorchTrainer(TrainConfig(), scratch(tmp_path / str(budget)), total_steps=1, seed=0)
        batch = make_batch(near_the_policy(trainer), budget=budget, normaliser=algorithm.normaliser)
        return trainer.step(batch, algorithm.loss)

    whole, split = step(1000), step(20)
    names = {"clip_fraction", "policy_kl", "correction_weight", "icepop_masked", "sequence_masked", "vetoed", "masked"}
    assert set(whole.metrics) == names
    assert 0 < whole.metrics["masked"] < 1
    for name in names:
        assert split.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-5)
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
