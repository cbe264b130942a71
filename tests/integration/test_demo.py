"""The demo teaches, and it is the reward that teaches: three seeds and a random-reward control."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]


def test_three_seeds_learn_and_a_random_reward_does_not(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    command = [sys.executable, "-m", "benchmarks.demo", "--control-seeds", "0", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1400, cwd=ROOT)
    result = json.loads(out.read_text())
    assert [run["seed"] for run in result["demo"]] == [0, 1, 2]
    for run in result["demo"]:
        assert run["eval_before"] < 0.5
        assert run["eval_after"] >= 0.9
        assert run["greedy_after"] > run["greedy_before"]
        assert run["logprob_mismatch_mean_abs"] <= 1e-5
        assert sum(run["time_split"].values()) == pytest.approx(1.0)
    (control,) = result["random_reward"]
    assert control["eval_before"] == result["demo"][0]["eval_before"], "the control must start from the same model"
    assert control["eval_after"] - control["eval_before"] < 0.05
