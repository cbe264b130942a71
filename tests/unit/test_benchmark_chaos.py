"""What the chaos benchmark judges by: its plan, and the lag of what was trained."""

from __future__ import annotations

from benchmarks.chaos import plan
from benchmarks.chaos_log import lags
from tests.unit.test_report_parts import episode

from sluice.log import Disposition, DispositionRecord, Entry, EpisodeRecord, Record, ResumeRecord, VersionRecord
from sluice.types import Version


def log(*records: Record) -> list[Entry]:
    return [Entry(seq, float(seq), record) for seq, record in enumerate(records, 1)]


def born(step: int, attempt: int = 0, *, parent: Version | None) -> VersionRecord:
    return VersionRecord(Version(step, attempt), parent, f"{step}.{attempt}")


def finished(id: str, step: int) -> EpisodeRecord:
    return EpisodeRecord(episode(id, "g000001", (0, 3, step)))


def trained(id: str, step: int, masked: int = 0) -> DispositionRecord:
    return DispositionRecord(id, "g000001", Disposition.TRAINED, step, masked_tokens=masked)


def test_a_plan_follows_from_its_seed_and_leaves_nothing_out() -> None:
    assert plan(30, 7) == plan(30, 7) != plan(30, 8)
    pairs = [(fault.part, fault.kind) for fault in plan(32, 7)]
    assert len(set(pairs[:16])) == len(set(pairs[16:])) == 16


def test_lag_is_counted_from_the_version_in_use_when_a_step_begins() -> None:
    line = [born(0, parent=None), finished("a", 0), finished("b", 0), finished("c", 0)]
    line += [trained("a", 1), born(1, parent=Version(0)), born(2, parent=Version(1)), trained("b", 3)]
    line += [born(3, parent=Version(2)), trained("c", 4)]
    assert lags(log(*line), 2) == {0: 1, 2: 1, 3: 1}
    assert lags(log(*line[:-1], trained("c", 4, masked=3)), 2) == {0: 1, 2: 1}  # what is too old was masked
    assert lags(log(*line[:-1], trained("c", 4, masked=2)), 2) == {0: 1, 2: 1, 3: 1}


def test_lag_of_a_version_that_a_resume_took_back_is_counted_from_where_the_branches_parted() -> None:
    line = [born(0, parent=None), born(1, parent=Version(0)), born(2, parent=Version(1)), finished("a", 2)]
    line += [ResumeRecord(1, 2), born(1, parent=Version(0)), born(2, 1, parent=Version(1)), trained("a", 3)]
    assert lags(log(*line), 2) == {1: 1}
