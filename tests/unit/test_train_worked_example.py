"""The worked example's packing and loss clauses, through the trainer (`shared/worked-example.md`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from train_cases import scratch
from worked import episodes

from sluice.config.train import TrainConfig
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import LossInputs, LossOutput, Normaliser, TrainSample, Version, expand

torch.set_num_threads(1)


def _samples(*, mask_stale: bool = False) -> list[TrainSample]:
    """e1's two segments with A = +1 and e2's with A = -1; stale tokens are those of version (3,0)."""
    samples = []
    for episode, advantage in zip(episodes(), (1.0, -1.0), strict=False):  # the third was never scored
        for sample in expand(episode):
            trained = sample.trained
            if mask_stale:
                trained = trained & (sample["version"] != Version(3).code)
            samples.append(
                sample.with_streams(weight=trained, advantage=np.where(sample["version"] >= 0, advantage, 0.0))
            )
    return samples


def _on_policy(inputs: LossInputs) -> LossOutput:
    """Every ratio 1 with the gradient of the ratio: a token's loss is -A."""
    ratio = (inputs.logprobs - inputs.logprobs.detach()).exp()
    return LossOutput(-inputs.streams["advantage"] * ratio, {})


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> TorchTrainer:
    folder = scratch(tmp_path_factory.mktemp("model"))
    return TorchTrainer(TrainConfig(micro_batch_tokens=32), folder, total_steps=20, seed=0)


def test_pack() -> None:
    (micro,) = make_batch(_samples(), budget=32, normaliser=Normaliser.TOKEN).micro_batches
    assert micro.lengths == (12, 13, 7)
    assert micro.cu_seqlens.tolist() == [0, 12, 25, 32]
    assert micro.positions.tolist() == [*range(12), *range(13), *range(7)]


@pytest.mark.parametrize("budget", [13, 20, 32])
@pytest.mark.parametrize(
    ("normaliser", "mask_stale", "expected", "trained"),
    [
        (Normaliser.TOKEN, False, -0.5, 12),
        (Normaliser.SEQUENCE, False, -1 / 3, 12),
        (Normaliser.EPISODE, False, 0.0, 12),
        (Normaliser.CONSTANT, False, -0.125, 12),
        (Normaliser.TOKEN, True, -0.4, 10),
    ],
)
def test_loss(
    trainer: TorchTrainer, normaliser: Normaliser, mask_stale: bool, expected: float, trained: int, budget: int
) -> None:
    batch = make_batch(_samples(mask_stale=mask_stale), budget=budget, normaliser=normaliser, constant=16)
    stats = trainer.step(batch, _on_policy)
    assert stats.loss == pytest.approx(expected, abs=1e-12)
    assert stats.num_trained_tokens == trained
