"""A run of two tasks with their own weights, samples and rewards: seen apart in the metrics, exact after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import rows, tiny

from sluice.config import RunConfig
from sluice.log import ACCOUNTED, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api

TIMED = ("time/", "speed/", "checkpoint/", "eval/seconds")


def mixed(folder: Path, steps: int) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    sources: dict[str, Any] = {}
    for name, part in (("few", rows()[:6]), ("many", rows()[6:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        sources[name] = {"type": "jsonl", "path": str(folder / f"{name}.jsonl")}
    parts = [
        {"name": "few", "source": sources["few"], "weight": 1, "samples": 2, "eval_prompts": 2},
        {"name": "many", "source": sources["many"], "weight": 3, "eval_prompts": 4},
    ]
    train = {"type": "mix", "parts": parts, "path": None}
    coin = {"type": "random", "tasks": ["many"]}
    return tiny(folder, data={"train": train}, steps=steps, rewards=[{"type": "exact"}, coin])


def test_two_tasks_in_one_run(tmp_path: Path) -> None:
    straight = mixed(tmp_path / "straight", 4)
    api.train(straight)
    for row in read_metrics(straight.folder / "metrics.jsonl"):
        assert (row["task/few/groups"], row["task/many/groups"]) == (1, 3), "weights hold in every batch"
        assert (row["task/few/episodes"], row["task/many/episodes"]) == (2, 12)
        counted = {name: row[f"task/{name}/episodes"] for name in ("few", "many")}
        parts = sum(row[f"reward/task/{name}"] * counted[name] for name in counted) / 14
        assert abs(parts - row["reward/mean"]) < 1e-9
        assert row["task/few/lag_max"] == row["task/many/infra_failure"] == row["task/few/groups_dropped"] == 0
        assert row["speed/task/few"] >= 0
    last = read_metrics(straight.folder / "metrics.jsonl")[-1]
    assert abs((2 * last["eval/few/accuracy"] + 4 * last["eval/many/accuracy"]) / 6 - last["eval/accuracy"]) < 1e-9
    assert {"eval/few/greedy", "eval/many/failed", "eval/many/response_tokens"} <= last.keys()
    assert account(LogReader(straight.folder / "log").read(kinds=ACCOUNTED)).complete

    api.train(mixed(tmp_path / "broken", 2))
    broken = mixed(tmp_path / "broken", 4)
    api.train(broken, resume=True)
    histories = [
        [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in read_metrics(file)]
        for file in (straight.folder / "metrics.jsonl", broken.folder / "metrics.jsonl")
    ]
    for row in (*histories[0][1:2], *histories[1][1:2]):  # the end of a run is evaluated
        for key in [key for key in row if key.startswith("eval/")]:
            del row[key]
    assert histories[0] == histories[1]
