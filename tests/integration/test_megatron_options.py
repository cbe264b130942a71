"""What Megatron computes again, keeps or rounds changes memory, not what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.megatron_rig import OPTIMIZER, Rig, tiny
from tests.integration.test_ranks import batch
from tests.unit.train_cases import ratio_loss

from sluice.config.train import TrainConfig
from sluice.train.backends.torch import TorchTrainer

pytestmark = [pytest.mark.timeout(200)]
AGAIN: dict[str, Any] = {"activation_checkpointing": True}
BF16: dict[str, Any] = {"dtype": "bfloat16"}
CASES: list[tuple[dict[str, Any], dict[str, Any], float]] = [
    ({}, AGAIN, 1e-5),
    ({"recompute_layers": 1}, AGAIN, 1e-5),
    ({"recompute": "mlp"}, AGAIN, 1e-5),
    ({"recompute": "attention"}, AGAIN, 1e-5),
    ({}, BF16, 2e-2),
    ({"distributed_optimizer": False, "overlap": False}, BF16, 2e-2),
    ({"gradients": "bfloat16"}, BF16, 4e-2),
    ({"gradients": "bfloat16", "distributed_optimizer": False, "overlap": False}, BF16, 4e-2),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def norms(model: Path) -> list[float]:
    """Of one process, in float32."""
    config = TrainConfig.model_validate({"optimizer": OPTIMIZER, "micro_batch_tokens": 64})
    alone = TorchTrainer(config, model, total_steps=10, seed=0)
    return [alone.step(batch(seed=seed), ratio_loss).grad_norm for seed in range(3)]


@pytest.mark.parametrize(("layout", "train", "tolerance"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_gradients_stay(
    megatron: Rig, model: Path, norms: list[float], layout: dict[str, Any], train: dict[str, Any], tolerance: float
) -> None:
    """Three steps: gradients of the first weights, and of weights that two updates made."""
    with megatron.trainer(1, model, layout, **train) as trainer:
        found = [trainer.step(batch(seed=seed), ratio_loss).grad_norm for seed in range(3)]
    np.testing.assert_allclose(found, norms, rtol=tolerance)


def test_another_policy_between_two_updates(megatron: Rig, model: Path, norms: list[float]) -> None:
    """Replicas fetch what others updated only as it is needed: not after a reference has stood in its place."""
    with megatron.trainer(2, model, {}) as trainer:
        found = [trainer.step(batch(seed=0), ratio_loss).grad_norm]
        trainer.score(batch(seed=1).samples, frozenset({"reference"}))
        found += [trainer.step(batch(seed=seed), ratio_loss).grad_norm for seed in (1, 2)]
    np.testing.assert_allclose(found, norms, rtol=1e-5)
