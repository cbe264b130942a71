"""The benchmarks of a training step with a tiny model: both backends compute the same, and every part is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.shapes import write_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_both_backends_beside_each_other(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    flags = ["--device=cpu", "--dtype=float32", "--shapes", "tiny", "--packs", "2x16", "--recompute", "none", "mlp"]
    command = [sys.executable, "-m", "benchmarks.training_step", *flags, "--steps=1", "--profile", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found == json.loads(done.stdout)
    rows = {(row["backend"], row["recompute"]): row for row in found["rows"]}
    assert rows.pop(("torch", "mlp"))["not_run"] == "torch recomputes all layers or none"
    first = rows["torch", "none"]["first_step"]
    for (backend, recompute), row in rows.items():
        assert row["tokens"] == 32, (backend, recompute)
        assert row["first_step"]["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
        parts = ("score", "forward_backward", "grad_norm", "update")
        assert min(row["seconds"][name] for name in parts) > 0
        assert row["seconds"]["whole"] <= sum(row["seconds"][name] for name in parts) + 1e-4
        assert {"matmul", "attention", "optimizer"} <= row["profile"]["seconds"].keys()
        assert 0 < row["mfu"] < 1
    assert len(rows) == 3


def test_one_trainer_measures_several_packs(tmp_path: Path) -> None:
    """What stands for all packs on one GPU: each gets what it would get alone."""
    write_model("tiny", tmp_path / "model")

    def measured(*packs: str) -> list[dict[str, Any]]:
        flags = ["--part=row", "--device=cpu", "--dtype=float32", "--shapes", "tiny", "--backends", "megatron"]
        flags += ["--recompute", "none", "--steps=1", "--peak=1e12", "--model", str(tmp_path / "model")]
        command = [sys.executable, "-m", "benchmarks.training_step", *flags, "--packs", *packs]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    first, second = measured("2x16", "1x24")
    (alone,) = measured("2x16")
    assert [row["tokens"] for row in (first, second)] == [32, 24]
    assert first["first_step"] == alone["first_step"]
    assert first["load_seconds"] == second["load_seconds"] > 0


def test_megatron_is_compared_with_torch(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    flags = ["--device=cpu", "--shape=tiny", "--lengths", "33", "9", "2", "--ranks", "1", "--only", "float32"]
    command = [sys.executable, "-m", "benchmarks.megatron_parity", *flags, "--jobs", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"torch float32", "float32", "float32, not compiled"}
    for name, row in rows.items():
        assert row["exact"], name
        assert row["returned"], name
        assert row["logprob_max"] < 1e-5, name
        assert max(row["gradient"], row["loss"], row["norm"]) < 1e-5, name
