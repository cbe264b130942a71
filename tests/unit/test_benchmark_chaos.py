"""What the chaos benchmark judges by: its plan, and the lag of what was trained."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from benchmarks.chaos import PAIRS, plan
from benchmarks.chaos_log import Recovered, elsewhere, lags, summed
from tests.unit.test_report_parts import episode

from sluice.log import (
    Disposition,
    DispositionRecord,
    Entry,
    EpisodeRecord,
    LogReader,
    Record,
    ResumeRecord,
    VersionRecord,
)
from sluice.log.writer import LogWriter
from sluice.types import Outcome, Version


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
    pairs = [(fault.part, fault.kind) for fault in plan(44, 7)]
    assert set(pairs[:22]) == set(pairs[22:]) == set(PAIRS)


def test_a_plan_without_room_for_all_pairs_holds_every_cut() -> None:
    cuts = {pair for pair in PAIRS if pair[1] == "cut"}
    assert {("mesh", "cut"), ("calls", "cut")} < cuts
    for seed in range(20):
        pairs = [(fault.part, fault.kind) for fault in plan(20, seed)]
        assert len(set(pairs)) == 20
        assert cuts < set(pairs) < set(PAIRS)


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


def test_what_an_agent_was_told_is_held_against_the_log(tmp_path: Path) -> None:
    """An episode that was offered again after a resume may have been finished by any of its agents, with their mark."""
    done = [replace(episode(id, "g000001"), info={"rewards": {"mark": mark}}) for id, mark in (("a", 0.1), ("b", 0.2))]
    dead = replace(episode("c", "g000001", outcome=Outcome.INFRA_FAILURE), reason="idle")
    again = replace(done[0], info={"rewards": {"mark": 0.3}})
    with LogWriter(tmp_path / "log") as writer:
        writer.append_many([EpisodeRecord(each) for each in (*done, dead, again)])
    told = [{"id": "a", "mark": 0.1}, {"id": "a", "mark": 0.3}, {"id": "b", "mark": 0.3}, {"id": "c", "mark": 0.4}]
    (tmp_path / "told").write_text("".join(json.dumps(each) + "\n" for each in told))
    found = elsewhere(LogReader(tmp_path / "log"), tmp_path / "told", {"a", "c"})
    assert found == {
        "outcomes": {"completed": 3, "infra_failure: idle": 1},
        "told_finished": 4,
        "told_finished_and_not_logged": 2,
        "failed_and_trained": 1,
    }


def test_runs_are_added_up() -> None:
    one = {"steps": 2, "fates": Counter({"trained": 3})}
    whole = summed([(one, [Recovered("agent cut", 1.0, 2.0)]), (one, [Recovered("agent cut", 3.0, 0.5)])])
    assert (whole["faults"], whole["runs"], whole["proof"]) == (2, 2, {"steps": 4, "fates": {"trained": 6}})
    assert whole["recovery_seconds"]["agent cut"]["to_next_update"] == {"p50": 2.0, "p99": 2.0, "max": 2.0}
    assert whole["recovery_seconds"].keys() == {"all", "agent cut"}
