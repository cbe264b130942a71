"""Learning rates by hand."""

from __future__ import annotations

import pytest

from sluice.config.train import OptimizerConfig
from sluice.train.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.2 + 0.8 * 0.853553390593, 0.6, 0.2 + 0.8 * 0.146446609407, 0.2, 0.2]),
    ],
)
def test_values(schedule: str, expected: list[float]) -> None:
    config = OptimizerConfig.model_validate({"lr": 1.0, "schedule": schedule, "warmup_steps": 2, "final_lr_ratio": 0.2})
    assert [learning_rate(config, step, 7) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_short_runs_stay_finite(schedule: str) -> None:
    config = OptimizerConfig.model_validate({"lr": 1.0, "schedule": schedule})
    assert learning_rate(config, 0, 0) == learning_rate(config, 0, 1) == 1.0
