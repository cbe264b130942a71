"""kill -9 at random moments, resume, and compare with a run that was never interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny

from sluice.config import RunConfig
from sluice.log import ACCOUNTED, EpisodeRecord, Kind, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.types import Episode

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["sluice.orchestrate.api"])
DEADLINE = 240.0
TIMED = ("time/", "speed/", "checkpoint/", "eval/seconds")


class Unhurried(NullView):
    """Holds the run up at each step: steps that take milliseconds would be over before a busy machine hits them."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        time.sleep(0.2)


def train(config: dict[str, Any], resume: bool) -> None:
    """What the child process runs."""
    from sluice.orchestrate import api

    api.train(RunConfig.model_validate(config), resume=resume, view=Unhurried())


def start(config: RunConfig, *, resume: bool) -> Any:
    process = PROCESSES.Process(target=train, args=(json.loads(config.model_dump_json()), resume))
    process.start()
    return process


def records(folder: Path) -> int:
    """How far the log has come; 0 while there is none."""
    newest = max(folder.glob("*.sqlite"), default=None)
    if newest is None:
        return 0
    try:
        return LogReader(folder).latest
    except sqlite3.Error:  # the file was born this moment
        return 0


def finish(config: RunConfig, *, resume: bool = False) -> None:
    process = start(config, resume=resume)
    process.join(DEADLINE)
    assert process.exitcode == 0, f"the run ended with {process.exitcode}"


def kill_when(config: RunConfig, cursor: int, *, resume: bool) -> bool:
    """Run until the log holds `cursor` records, then SIGKILL. False when the run was over before that."""
    process = start(config, resume=resume)
    until = time.monotonic() + DEADLINE
    log = config.folder / "log"
    while process.is_alive() and records(log) < cursor:
        assert time.monotonic() < until, "the run neither ended nor reached the record"
        process.join(0.002)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join(DEADLINE)
    assert alive or process.exitcode == 0, f"the run ended with {process.exitcode}"
    return alive


def trained_tokens(config: RunConfig) -> dict[str, list[list[int]]]:
    """Sampled ids of every training episode, newest record first."""
    found: dict[str, list[list[int]]] = {}
    for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,), from_ordinal=0):
        assert isinstance(entry.record, EpisodeRecord)
        episode: Episode = entry.record.episode
        found[episode.id] = [turn.ids.tolist() for turn in episode.sampled_turns()]
    return found


def comparable(config: RunConfig) -> list[dict[str, float]]:
    rows = read_metrics(config.folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def interrupt(config: RunConfig, total: int, kills: int, seed: int) -> int:
    """Kill at `kills` random records of the log, spread over the run; returns how many hit a living run."""
    chance = random.Random(seed)
    hits = 0
    for number in range(kills):
        low, high = total * number // kills, total * (number + 1) // kills
        hits += kill_when(
            config, max(chance.randrange(low, high), records(config.folder / "log")) + 1, resume=number > 0
        )
    return hits


GRPO = {"type": "grpo"}
PPO = {"type": "ppo", "critic": {"updates": 2, "warmup_batches": 1}}


@pytest.mark.parametrize(
    ("lag", "kills", "algorithm"), [(0, 10, GRPO), (1, 5, GRPO), (0, 3, PPO)], ids=["synchronous", "lag-1", "critic"]
)
def test_killed_at_random_moments_and_resumed(tmp_path: Path, lag: int, kills: int, algorithm: dict[str, Any]) -> None:
    gate = {"max_lag": lag}
    filters = [{"type": "min_valid", "count": 2}]
    changes: dict[str, Any] = {"steps": 10, "data": {"gate": gate, "filters": filters}, "algorithm": algorithm}
    straight = tiny(tmp_path / "straight", **changes)
    finish(straight)
    broken = tiny(tmp_path / "broken", **changes)
    total = records(straight.folder / "log")
    hits = interrupt(broken, total, kills, seed=lag)
    assert hits >= kills * 0.8, "too few kills met a living run to prove anything"
    finish(broken, resume=True)

    fate = account(LogReader(broken.folder / "log").read(kinds=ACCOUNTED))
    assert not fate.decided_twice, "an episode was trained twice in the surviving lineage"
    assert not fate.unlogged, "an episode was consumed before it was logged"
    for step in range(1, 11):
        assert len(fate.trained_at(step)) == 16, f"step {step} did not train its 4 groups of 4"
    alone = algorithm.get("critic", {}).get("warmup_batches", 0)
    assert all(row["train/grad_norm"] > 0 for row in read_metrics(straight.folder / "metrics.jsonl")[alone:])
    if lag:
        return
    assert fate.complete, "an episode was lost or logged twice"
    assert trained_tokens(broken) == trained_tokens(straight)
    for mine, theirs in zip(comparable(broken), comparable(straight), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    before, after = (json.loads((each.folder / "summary.json").read_text()) for each in (straight, broken))
    for name in ("eval_before", "eval_after", "greedy_before", "greedy_after", "steps", "seed"):
        assert before[name] == pytest.approx(after[name], abs=1e-6)


def test_ctrl_c_says_how_to_go_on_and_going_on_works(tmp_path: Path) -> None:
    config = tiny(tmp_path, steps=120, evaluation={"every": 0})
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config.model_dump_json())
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + DEADLINE
    while records(config.folder / "log") < 150:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "the run did not get going"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=DEADLINE)[1]
    assert process.returncode == 130
    assert "--resume" in error
    assert "Traceback" not in error
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    fate = account(LogReader(config.folder / "log").read(kinds=ACCOUNTED))
    assert fate.complete
    assert len(fate.trained_at(120)) == 16
