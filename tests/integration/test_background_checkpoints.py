"""Checkpoints that are written while a run trains on: the moment they are of, and what a kill or Ctrl-C leaves of them.

The disk is made slow where it matters: the flush of a checkpoint's first file waits until the run has trained on.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_kill_resume import DEADLINE, PROCESSES, comparable, finish, trained_tokens
from tests.tiny import tiny

from sluice.checkpoint import store
from sluice.checkpoint.store import Checkpoint, CheckpointStore
from sluice.config import RunConfig
from sluice.log import ACCOUNTED, CheckpointRecord, Kind, LogReader, account
from sluice.obs.metrics import read_metrics

PPO = {"type": "ppo", "critic": {"updates": 2}}
SLOW: dict[str, Any] = {"steps": 9, "checkpoint": {"every": 4, "keep": 9}}


def wait_until(happened: Callable[[], object], what: str) -> None:
    until = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < until, what
        time.sleep(0.005)


def rows(config: RunConfig) -> int:
    file = config.folder / "metrics.jsonl"
    return len(read_metrics(file)) if file.exists() else 0


def slow(config: RunConfig, step: int, go_on: Callable[[], object]) -> None:
    """From now on in this process: the checkpoint of `step` reaches the disk after `go_on`."""
    flush = store._flush
    torn = config.folder / "checkpoints" / f".step-{step:06d}.tmp"

    def flush_slowly(path: Path) -> None:
        if torn in path.parents:
            wait_until(go_on, "the run did not go on while a checkpoint was written")
        flush(path)

    store._flush = flush_slowly


def train_slowly(raw: dict[str, Any], step: int, trained: int, mark: str) -> None:
    """What a child does: the checkpoint of `step` waits for a file, which is not made before `trained` batches."""
    from sluice.orchestrate import api

    config = RunConfig.model_validate(raw)
    slow(config, step, lambda: rows(config) >= trained and Path(mark).exists())
    api.train(config)


def kept(config: RunConfig) -> dict[int, Checkpoint]:
    return {each.step: each for each in CheckpointStore(config.folder / "checkpoints", keep=9).all()}


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every file but those that hold times."""
    files = (file for file in checkpoint.folder.rglob("*") if file.is_file())
    return {str(f.relative_to(checkpoint.folder)): f.read_bytes() for f in files if f.parent != checkpoint.folder}


def same(ours: Checkpoint, theirs: Checkpoint) -> None:
    ours.verify()
    assert contents(ours) == contents(theirs)
    assert {name.partition("/")[0] for name in contents(ours)} >= {"model", "trainer"}
    mine, other = ours.state(), theirs.state()
    for name in ("version", "lineage", "buffer"):
        assert mine[name] == other[name]
    for name in ("batch", "step", "rollout_tokens", "trained_tokens", "mismatch_sum"):
        assert mine["progress"][name] == other["progress"][name]
    first, second = ({**(state["progress"]["before"] or {}), "seconds": None} for state in (mine, other))
    assert first == second


@pytest.mark.parametrize(
    "changes", [{}, {"algorithm": PPO}, {"data": {"gate": {"max_lag": 1}}}], ids=["0", "ppo", "lag"]
)
def test_a_slow_write_is_the_one_made_while_the_run_stood_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Three further steps are trained meanwhile; at any lag, the run itself is the same, too."""
    from sluice.orchestrate import api

    background = tiny(tmp_path / "background", **SLOW, **changes)
    waiting = tiny(
        tmp_path / "waiting", **SLOW | {"checkpoint": {**SLOW["checkpoint"], "background": False}}, **changes
    )
    monkeypatch.setattr(store, "_flush", store._flush)
    seen: list[int] = []
    slow(background, 4, lambda: rows(background) >= 7 and (seen.append(4 in kept(background)) or True))
    api.train(background)
    assert seen
    assert not any(seen)
    api.train(waiting)
    assert list(kept(background)) == list(kept(waiting)) == [0, 4, 8, 9]
    for step, ours in kept(background).items():
        same(ours, kept(waiting)[step])
    assert comparable(background) == comparable(waiting)
    assert trained_tokens(background) == trained_tokens(waiting)
    written = [
        row["step"] for row in read_metrics(background.folder / "metrics.jsonl") if "checkpoint/write_seconds" in row
    ]
    assert not {5, 6, 7} & set(written), "the checkpoint of step 4 is in no row of a step that was trained meanwhile"
    assert {8, 9} & set(written)
    told = [e.record for e in LogReader(background.folder / "log").read(kinds=(Kind.CHECKPOINT, Kind.VERSION))]
    place = next(n for n, record in enumerate(told) if isinstance(record, CheckpointRecord) and record.step == 4)
    before = told[place - 1]
    assert before.version.step >= 7, "the log says that it exists after the steps that were trained meanwhile"
    assert str(told[place].version) == kept(background)[4].state()["version"]


def test_killed_while_one_is_written(tmp_path: Path) -> None:
    """SIGKILL with the checkpoint of step 4 on its way and three more steps trained: on from step 0, nothing lost."""
    straight, broken = (tiny(tmp_path / name, **SLOW) for name in ("straight", "broken"))
    finish(straight)
    never = str(tmp_path / "never")
    process = PROCESSES.Process(target=train_slowly, args=(json.loads(broken.model_dump_json()), 4, 7, never))
    process.start()
    wait_until(lambda: rows(broken) >= 7 or not process.is_alive(), "the run did not get on")
    os.kill(process.pid, signal.SIGKILL)
    process.join(DEADLINE)
    assert list(kept(broken)) == [0]
    assert (broken.folder / "checkpoints" / ".step-000004.tmp").exists()
    finish(broken, resume=True)
    fate = account(LogReader(broken.folder / "log").read(kinds=ACCOUNTED))
    assert fate.complete
    assert [len(fate.trained_at(step)) for step in range(1, 10)] == [16] * 9
    assert trained_tokens(broken) == trained_tokens(straight)
    assert comparable(broken) == comparable(straight)
    assert list(kept(broken)) == [0, 4, 8, 9]
    for step, ours in kept(broken).items():
        assert contents(ours) == contents(kept(straight)[step]), f"step {step}"
    assert not list((broken.folder / "checkpoints").glob(".*"))


def test_interrupted_while_one_is_written(tmp_path: Path) -> None:
    """Ctrl-C: the run ends when the checkpoint is whole, and goes on from there."""
    config, mark = tiny(tmp_path, **SLOW), tmp_path / "go-on"
    process = PROCESSES.Process(target=train_slowly, args=(json.loads(config.model_dump_json()), 4, 6, str(mark)))
    process.start()
    wait_until(lambda: rows(config) >= 6 or not process.is_alive(), "the run did not get on")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)  # for the interrupt to arrive while the write still stands
    mark.touch()
    process.join(DEADLINE)
    assert process.exitcode == 1, "KeyboardInterrupt"
    assert list(kept(config)) == [0, 4]
    kept(config)[4].verify()
    assert not list((config.folder / "checkpoints").glob(".*"))
    told = [e.record for e in LogReader(config.folder / "log").read(kinds=(Kind.CHECKPOINT,))]
    assert [record.step for record in told if isinstance(record, CheckpointRecord)] == [0, 4]
    finish(config, resume=True)
    assert account(LogReader(config.folder / "log").read(kinds=ACCOUNTED)).complete


def test_a_run_returns_when_its_last_checkpoint_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sluice.orchestrate import api

    config = tiny(tmp_path, steps=2, checkpoint={"every": 0})
    monkeypatch.setattr(store, "_flush", store._flush)
    asked: list[float] = []

    def half_a_second_later() -> bool:
        asked.append(time.monotonic())
        return asked[-1] > asked[0] + 0.5

    slow(config, 2, half_a_second_later)
    api.train(config)
    assert list(kept(config)) == [0, 2]
    kept(config)[2].verify()
    assert not list((config.folder / "checkpoints").glob(".*"))
