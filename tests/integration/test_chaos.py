"""Every part of a run met by every fault once, at random moments: nothing is lost, and nothing is trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks.chaos import LAG, PAIRS, storms

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_200)]


def test_nothing_is_lost_or_trained_twice_whatever_part_is_hit(tmp_path: Path) -> None:
    """`storms` fails unless the run completes and its log holds the proof."""
    kept: list[dict[str, Any]] = []
    result = storms(tmp_path, faults=len(PAIRS), seed=0, keep=kept.append)
    print(json.dumps(result, indent=1))
    proof = result["proof"]
    assert kept == [result]
    assert (result["faults"], result["runs"]) == (22, 1)
    assert result["recovery_seconds"].keys() == {"all", *(f"{part} {kind}" for part, kind in PAIRS)}
    assert (proof["lost"], proof["decided_twice"], proof["steps_without_their_batch"]) == (0, 0, 0)
    assert proof["finished_episodes"] >= proof["steps"] * 16
    assert proof["told_finished"] >= proof["steps"] * 8
    assert {each.partition(":")[0] for each in proof["outcomes"]} <= {"completed", "truncated", "infra_failure"}
    assert 1 <= max(int(lag) for lag in proof["trained_spans_by_lag"]) <= LAG
    assert proof["resumes"] >= 1  # of the killed controllers and ranks
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    assert not [line for line in lines if str(tmp_path) in line], "a part outlived the run"
