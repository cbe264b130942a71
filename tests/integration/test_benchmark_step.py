"""The benchmark of a training step with a tiny model: both backends compute the same, and every part is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
