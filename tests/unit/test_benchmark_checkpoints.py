"""The benchmark of checkpoints with a model of toy size: it measures both kinds, and whole ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmarks import checkpoints


def test_it_measures_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"layers": 1, "hidden": 64, "intermediate": 64, "vocabulary": 64, "rounds": 2, "budget": 256}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["checkpoints", *words, "--folder", str(tmp_path), "--out", str(out)])
    checkpoints.main()
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["copy_bytes"] == 12 * found["parameters"]
    assert found["copy_bytes"] < found["checkpoint_bytes"] < 2 * found["copy_bytes"], "weights and moments, and no more"
    for kind in ("waiting", "background"):
        timed = found["rounds"][kind]
        assert len(timed["stands_still_seconds"]) == len(timed["write_seconds"]) == 2
        assert len(timed["step_seconds"]) >= 2
        assert min(min(values) for values in timed.values()) > 0
    for still, write in zip(
        *(found["rounds"]["waiting"][f"{n}_seconds"] for n in ("stands_still", "write")), strict=True
    ):
        assert still > write, "a run that waits stands still for all of it"
    assert list(tmp_path.iterdir()) == [out], "the model and its checkpoints are gone"
