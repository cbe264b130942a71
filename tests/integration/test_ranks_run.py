"""Whole runs whose trainer has ranks: what they learn is what one process learns, through phases, kills and resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file
from tests.integration.test_kill_resume import PPO, comparable, finish, kill_when, trained_tokens
from tests.tiny import merge, tiny

from sluice.config import RunConfig

pytestmark = [pytest.mark.timeout(580), pytest.mark.slow]
ROOT = Path(__file__).parents[2]
QUICK: dict[str, Any] = {"evaluation": {"every": 0, "greedy": False}, "steps": 4, "checkpoint": {"every": 1}}


def recipe(folder: Path, ranks: int, **changes: Any) -> RunConfig:
    both = {"ranks": ranks, "micro_batch_tokens": 64}
    return tiny(folder, **merge(QUICK, merge({"train": both}, changes)))


def phases(folder: Path, ranks: int) -> dict[str, Any]:
    """A warm start and pairs, with ranks of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": str(a), "prompt": f"{a}+1=", "response": str(a + 1)} for a in range(8)]
    pairs = [{"id": str(a), "prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a)} for a in range(8)]
    for name, content in (("shown", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    train = {"ranks": ranks, "micro_batch_tokens": 64}
    shown, told = ({"type": "jsonl", "path": str(folder / f"{name}.jsonl")} for name in ("shown", "pairs"))
    return {
        "warm_start": {"demonstrations": shown, "steps": 4, "batch": 6, "train": train},
        "preferences": {"pairs": told, "steps": 3, "batch": 4, "train": train},
    }


def same_run(ours: RunConfig, theirs: RunConfig, tolerance: float = 1e-4) -> None:
    """The same episodes, and the same figures but for rounding; it also makes a resumed step another attempt."""
    assert trained_tokens(ours) == trained_tokens(theirs)
    for mine, other in zip(comparable(ours), comparable(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if name == "version/attempt":
                continue
            np.testing.assert_allclose(mine[name], value, rtol=tolerance, atol=1e-6, err_msg=name)


def same_weights(ours: Path, theirs: Path) -> None:
    mine, other = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        np.testing.assert_allclose(mine[name].numpy(), tensor.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def ended(folder: Path) -> None:
    """No rank whose log is in `folder` outlives its controller."""
    until = time.monotonic() + 30
    while any(str(folder) in output(process) for process in psutil.process_iter()):
        assert time.monotonic() < until, "ranks outlived their controller"
        time.sleep(0.1)


def output(process: psutil.Process) -> str:
    """Where a rank writes to; nothing of another process, or one that has ended meanwhile."""
    with suppress(OSError, psutil.Error):
        if "sluice.train.ranks.program" in process.cmdline():
            return os.readlink(f"/proc/{process.pid}/fd/1")
    return ""


def test_phases_before_rl_and_the_run_itself(tmp_path: Path) -> None:
    """SFT, DPO and GRPO, each over two ranks, against each in one process."""
    ours = recipe(tmp_path / "two", 2, **phases(tmp_path / "two", 2))
    theirs = recipe(tmp_path / "one", 1, **phases(tmp_path / "one", 1))
    finish(ours)
    finish(theirs)
    for name in ("model-sft", "model-dpo"):
        same_weights(ours.folder / name, theirs.folder / name)
    same_run(ours, theirs)
    assert sorted(path.name for path in (ours.folder / "ranks").iterdir()) == ["dpo", "policy", "sft"]


def test_killed_with_two_ranks_resumed_with_one_and_with_three(tmp_path: Path) -> None:
    """kill -9 of the controller in the middle: its ranks end, and another number of them goes on."""
    reference = recipe(tmp_path / "reference", 1)
    finish(reference)
    run = recipe(tmp_path / "killed", 2)
    resume = False
    for ranks, cursor in ((2, 45), (1, 70)):
        assert kill_when(recipe(tmp_path / "killed", ranks), cursor, resume=resume)
        resume = True
        ended(run.folder)
    finish(recipe(tmp_path / "killed", 3), resume=True)
    same_run(run, reference)
    leftover = [path for path in (run.folder / "ranks").rglob("*") if path.is_file() and path.suffix != ".log"]
    assert leftover == []


def test_a_critic_stays_with_the_controller(tmp_path: Path) -> None:
    """PPO: the policy over two ranks, the critic in the process of the run."""
    ours, theirs = (recipe(tmp_path / str(ranks), ranks, algorithm=PPO) for ranks in (2, 1))
    finish(ours)
    finish(theirs)
    same_run(ours, theirs)


def test_the_benchmark_measures_what_it_says(tmp_path: Path) -> None:
    """A model of toy size: the gradient of two ranks is that of one, and what needs accelerators is not run."""
    sizes = {"layers": 1, "hidden": 64, "vocabulary": 64, "samples": 6, "budget": 256, "steps": 1}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    command = [
        sys.executable,
        "-m",
        "benchmarks.ranks",
        *words,
        "--ranks",
        "1",
        "2",
        "--out",
        str(tmp_path / "found.json"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "found.json").read_text())
    assert 0 < found["ranks"]["2"]["difference"] < 1e-5
    assert sum(found["ranks"]["2"]["tokens"]) == found["batch_tokens"]
    assert len(found["ranks"]["2"]["peak_bytes"]) == 2
    for one in found["ranks"].values():
        assert one["tokens_per_second"] > 0
        assert min(one["peak_bytes"]) > found["ranks"]["1"]["libraries_bytes"] / 2
    far = subprocess.run(
        [*command, "--device", "cuda", "--ranks", "64"], cwd=ROOT, check=True, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert json.loads(far.stdout)["ranks"] == {"64": "needs 64 GPUs, not run"}
