"""A run that was killed goes on under a tighter bound: what its log holds is used as far as it keeps that bound."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from tests.tiny import tiny

from sluice.config import RunConfig
from sluice.log import ACCOUNTED, Disposition, GroupRecord, LogReader, LogWriter, VersionRecord, account
from sluice.log.records import keys
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api
from sluice.types import Version

WAITS = {"order": "dispatch", "on_stale": "wait"}
LATE = "g000005.0"

REWARD = '''
import asyncio
import pathlib

HERE = pathlib.Path(__file__).parent


async def reward(prompt, answer):
    """Of the prompt that is named in a file, when the run has trained its first batch."""
    late = HERE / "late"
    while late.exists() and late.read_text() == prompt.id and not (HERE / "runs/tiny/metrics.jsonl").read_text():
        await asyncio.sleep(0.01)
    return float(len(answer) % 2)
'''


def lagging(folder: Path, lag: int, **gate: str) -> RunConfig:
    return tiny(
        folder, steps=4, data={"gate": {"max_lag": lag, **gate}}, evaluation={"every": 0, "greedy": False},
        checkpoint={"every": 0}, rewards=[{"type": "python", "path": f"{folder / 'slow_for_one.py'}:reward"}],
    )  # fmt: skip


def kill(folder: Path, run: Path) -> None:
    """Leave of a run what one leaves that is killed after its first step, while an episode of the next is late."""
    shutil.rmtree(run / "checkpoints" / "step-000004")
    log, whole = run / "log", run / "whole"
    log.rename(whole)
    writer = LogWriter(log)
    for entry in LogReader(whole).read():
        if isinstance(entry.record, GroupRecord) and entry.record.request.ordinal == 5:
            (folder / "late").write_text(entry.record.request.prompt.id)
        if keys(entry.record)[0] != LATE:
            writer.append_many([entry.record])
        if isinstance(entry.record, VersionRecord) and entry.record.version == Version(1):
            break
    writer.close()


@pytest.mark.parametrize("before", [WAITS, {}], ids=["waits", "masks"])
def test_what_is_in_the_log_is_trained_within_the_tighter_bound(tmp_path: Path, before: dict[str, str]) -> None:
    """The third batch is in the log, one step old when it is asked for, and would be trained a step after that."""
    (tmp_path / "slow_for_one.py").write_text(REWARD)
    wide = lagging(tmp_path, 3, **before)
    api.train(wide)
    kill(tmp_path, wide.folder)
    tight = lagging(tmp_path, 1, **WAITS)
    api.train(tight, resume=True)
    rows = read_metrics(tight.folder / "metrics.jsonl")
    assert [row["gate/lag_max"] for row in rows[:3]] == [0, 1, 1]
    assert len(rows) == 4
    assert rows[3]["gate/lag_max"] <= 1
    fate = account(LogReader(tight.folder / "log").read(kinds=ACCOUNTED))
    assert not fate.undecided
    assert not fate.unlogged
    kinds = {id: tuple(record.disposition for record in records) for id, records in fate.surviving.items()}
    again = {id for id, kind in kinds.items() if kind == (Disposition.DROPPED, Disposition.TRAINED)}
    assert Counter(kinds.values()) == {
        (Disposition.TRAINED,): 64 - len(again),
        (Disposition.DROPPED, Disposition.TRAINED): len(again),
    }
    third = [f"g{group:06}.{sample}" for group in range(8, 12) for sample in range(4)]
    assert {fate.surviving[id][0].reason for id in third} == {
        "sampled under a wider bound than max_lag = 1, before the resume"
    }
