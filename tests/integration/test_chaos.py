"""Twenty faults at random moments of one run: kills, freezes and slowness of every part, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from benchmarks.chaos import KINDS, LAG, PARTS, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_nothing_is_lost_or_trained_twice_whatever_part_is_hit(tmp_path: Path) -> None:
    """`run` fails unless the run completes and its log holds the proof."""
    result = run(tmp_path, faults=20, seed=0)
    print(json.dumps(result, indent=1))
    proof = result["proof"]
    assert result["faults"] == 20
    assert result["recovery_seconds"].keys() == {"all", *(f"{part} {kind}" for part in PARTS for kind in KINDS)}
    assert (proof["lost"], proof["decided_twice"], proof["steps_without_their_batch"]) == (0, 0, 0)
    assert proof["finished_episodes"] >= proof["steps"] * 16
    assert 1 <= max(int(lag) for lag in proof["trained_spans_by_lag"]) <= LAG
    assert proof["resumes"] >= 1  # of the killed controllers and ranks
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    assert not [line for line in lines if str(tmp_path) in line], "a part outlived the run"
