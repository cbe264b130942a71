"""Metric sinks, the phase timer, the summary: what is written survives a kill and describes one lineage."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from sluice.errors import LogError
from sluice.obs.metrics import JsonlSink, MetricSink, TensorBoardSink, read_metrics
from sluice.obs.summary import Summary
from sluice.obs.timing import PhaseTimer


def rows(path: Path) -> list[tuple[int, float | None]]:
    return [(row["step"], row.get("reward/mean")) for row in read_metrics(path)]


# ── metrics.jsonl ───────────────────────────────────────────────────────────────────────────────────────


def test_a_row_is_readable_at_once_and_keeps_every_key(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(1, {"reward/mean": 0.5, "train/loss": math.nan, "a/ü": np.float32(2), "lag": 3})  # type: ignore[dict-item]
    assert read_metrics(path) == [{"step": 1, "reward/mean": 0.5, "train/loss": None, "a/ü": 2.0, "lag": 3.0}]
    assert "NaN" not in path.read_text()
    sink.close()
    sink.close()


def test_resume_cuts_off_abandoned_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2, 2, 3, 4):
        sink.write(step, {"reward/mean": step / 10})
    sink.close()
    resumed = JsonlSink(path)
    resumed.truncate_after(2)
    resumed.write(3, {"reward/mean": 9.0})
    resumed.close()
    assert rows(path) == [(1, 0.1), (2, 0.2), (2, 0.2), (3, 9.0)]
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"
    fresh = JsonlSink(path)
    fresh.truncate_after(-1)
    fresh.close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"step": 3, "reward/m', b'{"step": 3, "reward/mean": 1.0}', b"\x00\x00\x00"])
def test_a_torn_last_line_is_survived(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "reward/mean": 0.1}\n' + torn)
    assert rows(path) == [(1, 0.1)]
    sink = JsonlSink(path)
    sink.write(2, {"reward/mean": 0.2})
    sink.truncate_after(2)
    sink.close()
    assert rows(path) == [(1, 0.1), (2, 0.2)]


@pytest.mark.parametrize("line", [b"garbage", b"[1]", b'{"reward": 1}', b'{"step": "1"}', b"{"])
def test_a_broken_line_in_the_middle_is_told(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(LogError, match=r"metrics\.jsonl:2"):
        JsonlSink(path).truncate_after(1)


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_every_kill_leaves_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, sys; from pathlib import Path; from sluice.obs.metrics import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in range(5): sink.write(step, {'reward/mean': 1.0})\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60).returncode == 9
    assert [step for step, _ in rows(path)] == [0, 1, 2, 3, 4]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks: list[MetricSink] = [TensorBoardSink(tmp_path)]
    for sink in sinks:
        for step in (1, 2, 3):
            sink.write(step, {"reward/mean": step / 10})
        sink.truncate_after(1)
        sink.write(2, {"reward/mean": 7.0})
        sink.close()
        sink.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(e.step, round(e.value, 3)) for e in read.Scalars("reward/mean")] == [(1, 0.1), (2, 7.0)]


def test_obs_needs_no_torch() -> None:
    modules = ["atomic", "board", "compare", "format", "live", "metrics", "summary", "timing", "view"]
    code = f"import sys\nfor name in {modules}: __import__('sluice.obs.' + name)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nested_phases_are_exclusive_and_shares_sum_to_one() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    clock.now += 1
    with timer.phase("train"):
        clock.now += 2
        with timer.phase("publish"):
            clock.now += 3
        with suppress(KeyError), timer.phase("publish"):
            clock.now += 1
            raise KeyError
        clock.now += 4
    assert (timer.seconds("train"), timer.seconds("publish"), timer.seconds("never")) == (6, 4, 0)
    assert timer.wall_seconds == 11
    assert timer.split() == {"train": 6 / 11, "publish": 4 / 11, "other": 1 / 11}
    assert timer.lap() == {"train": 6, "publish": 4, "other": 1}
    with timer.phase("train"):
        clock.now += 1
        assert timer.lap() == {"train": 1}, "an open phase is counted up to now"
    assert timer.lap() == {}


def test_no_time_has_no_shares() -> None:
    assert PhaseTimer(Clock()).split() == {}


def test_the_timer_goes_on_after_a_resume() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("train"):
        clock.now += 5
    state = json.loads(json.dumps(timer.state_dict()))
    resumed = PhaseTimer(clock)
    with resumed.phase("load"):
        clock.now += 1
    resumed.load_state_dict(state)
    with resumed.phase("train"):
        clock.now += 2
    assert (resumed.seconds("train"), resumed.wall_seconds) == (7, 8)
    assert resumed.lap() == {"load": 1, "train": 2}, "a lap has only this process's time"


def test_interleaved_tasks_count_each_second_once() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)

    async def one(name: str, mine: asyncio.Event, other: asyncio.Event) -> None:
        with timer.phase(name):
            clock.now += 1
            mine.set()
            await other.wait()
            clock.now += 1

    async def both() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(one("a", first, second), one("b", second, first))

    asyncio.run(both())
    assert timer.wall_seconds == 4
    assert timer.seconds("a") + timer.seconds("b") == 4
    clock.now += 1
    assert timer.seconds("other") == 1


# ── summary ─────────────────────────────────────────────────────────────────────────────────────────────


def test_summary(tmp_path: Path) -> None:
    summary = Summary(
        0.1, 0.9, None, None, 60, 19.5, 5e3, 2e3, {"rollout": 0.6}, math.nan, 7, {"model": "tiny", "n": [math.inf]}
    )
    path = tmp_path / "summary.json"
    summary.write(path)
    held = json.loads(path.read_text())
    assert (held["eval_after"], held["logprob_mismatch_mean_abs"], held["extra"]["n"]) == (0.9, None, [None])
    assert Summary.read(path).time_split == {"rollout": 0.6}
    assert list(tmp_path.iterdir()) == [path]
    for content in ("", "{}", '{"more": 1}'):
        path.write_text(content)
        with pytest.raises(LogError, match="is no summary"):
            Summary.read(path)
    with pytest.raises(LogError, match="is no summary"):
        Summary.read(tmp_path / "none.json")
