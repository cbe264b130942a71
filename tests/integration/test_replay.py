"""A run's log as the data source: the same training again, other training on the same data, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny

from sluice.errors import ConfigError, DataError
from sluice.log import ACCOUNTED, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api

SAME = ("reward/", "train/", "mismatch/", "gate/", "version/")


def rows(folder: Path) -> list[dict[str, float]]:
    """What replaying must reproduce of every batch."""
    found = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.startswith(SAME) and isinstance(v, int | float)} for row in found]


def replay_of(folder: Path, run: Path, name: str = "again", **changes: Any) -> Any:
    return tiny(folder, **{"name": name, "replay": str(run), **changes})


def proven(folder: Path) -> None:
    assert account(LogReader(folder / "log").read(kinds=ACCOUNTED)).complete


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    config = tiny(folder, evaluation={"every": 0})
    api.train(config)
    return config.folder


def test_the_same_recipe_gives_the_same_metrics(source: Path, tmp_path: Path) -> None:
    config = replay_of(tmp_path, source)
    summary = api.train(config)
    assert (summary.steps, summary.eval_after) == (6, None)
    before, after = rows(source), rows(config.folder)
    assert len(before) == len(after) == 6
    assert any(key.startswith("train/") for key in before[0])
    for old, new in zip(before, after, strict=True):
        assert new == pytest.approx(old, abs=1e-6)
    proven(config.folder)


@pytest.mark.slow
def test_lag_is_that_of_the_recording(tmp_path: Path) -> None:
    gate: dict[str, Any] = {"data": {"gate": {"max_lag": 1}}}
    first = tiny(tmp_path, **gate)
    api.train(first)
    second = replay_of(tmp_path, first.folder, **gate)
    api.train(second)
    assert max(row["gate/lag_max"] for row in rows(first.folder)) == 1
    for old, new in zip(rows(first.folder), rows(second.folder), strict=True):
        assert new == pytest.approx(old, abs=1e-6)
    with pytest.raises(ConfigError, match="up to 1 steps old"):
        api.train(replay_of(tmp_path, first.folder, "tight"))


def test_another_algorithm_and_batch_size(source: Path, tmp_path: Path) -> None:
    config = replay_of(tmp_path, source, algorithm={"type": "rloo"}, groups_per_step=8, steps=3,
                       data={"gate": {"max_lag": 2}})  # fmt: skip
    assert api.train(config).steps == 3
    proven(config.folder)


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 24 groups.*asks for 28"):
        api.train(replay_of(tmp_path, source, steps=7))
    with pytest.raises(DataError, match="holds no log"):
        api.train(replay_of(tmp_path, tmp_path / "nothing", "none"))
    with pytest.raises(ValueError, match="own folder"):
        replay_of(tmp_path, tmp_path / "runs" / "again")


@pytest.mark.slow
def test_kill_and_resume(source: Path, tmp_path: Path) -> None:
    config = replay_of(tmp_path, source)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    metrics = config.folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    api.train(config, resume=True)
    for old, new in zip(rows(source), rows(config.folder), strict=True):
        assert new == pytest.approx(old, abs=1e-6)
    proven(config.folder)
