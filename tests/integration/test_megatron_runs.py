"""Whole runs that Megatron trains are the runs that the torch backend trains, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.megatron_rig import OPTIMIZER, Rig, cases, small
from tests.tiny import merge, tiny

from sluice.config import RunConfig
from sluice.log import ACCOUNTED, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api, trainers

pytestmark = [pytest.mark.timeout(280)]
STEPS = 10
MEASURED = ("reward/", "train/", "mismatch/", "gate/", "version/step")
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}), (2, {"tp": 2}), (2, {"pp": 2, "vpp": 2}), (2, {"cp": 2}), (4, {"tp": 2, "pp": 2}), (4, {"tp": 2}),
]  # fmt: skip


def recipe(folder: Path, model: Path, **changes: Any) -> RunConfig:
    """GRPO with a penalty towards the reference policy."""
    base: dict[str, Any] = {
        "model": {"scratch": None, "path": str(model)},
        "algorithm": {"type": "grpo", "kl": {"coefficient": 0.05}},
        "train": {"optimizer": {**OPTIMIZER, "lr": 1e-2}, "micro_batch_tokens": 64, "rank_seconds": 120},
        "evaluation": {"every": 0, "greedy": False},
        "steps": STEPS,
    }
    return tiny(folder, **merge(base, changes))


def measured(config: RunConfig) -> list[dict[str, float]]:
    """What was trained, by batch."""
    found = read_metrics(config.folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.startswith(MEASURED) and isinstance(v, int | float)} for row in found]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of the torch backend, whose log the others train on."""
    folder = tmp_path_factory.mktemp("recorded")
    config = recipe(folder, small(folder / "model"))
    api.train(config, view=NullView())
    return config


@pytest.mark.parametrize(("ranks", "layout"), cases(LAYOUTS, quick=(LAYOUTS[0], LAYOUTS[1], LAYOUTS[4])))
def test_ten_steps_on_one_log_in_every_layout(
    megatron: Rig, recorded: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int,
    layout: dict[str, Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(trainers, "ProcessCrew", lambda size, folder, environment: megatron.crew(size))
    chosen = {"backend": "megatron", "ranks": ranks, "megatron": layout}
    config = recipe(tmp_path, recorded.model.path, name="again", replay=str(recorded.folder), train=chosen)
    assert api.train(config, view=NullView()).steps == STEPS
    before, after = measured(recorded), measured(config)
    assert len(before) == len(after) == STEPS
    assert all(row["train/reference_kl"] > 0 for row in before[1:])
    for theirs, ours in zip(before, after, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            least = 1e-5 if name.startswith("mismatch/") else 1e-6  # which is rounding, of log-probs
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=least, err_msg=name)
    assert account(LogReader(config.folder / "log").read(kinds=ACCOUNTED)).complete
