"""The demo on several seeds, and with a random reward: held-out accuracy before and after RL.

    python benchmarks/demo.py [--seeds 0 1 2] [--control-seeds 0 1] [--out FILE]

Each run is a process of its own, one after the other, from random weights: `sluice train recipes/demo.py`. The
control differs in the reward alone, a seeded coin. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.py"
KEPT = (
    "seed", "eval_before", "eval_after", "greedy_before", "greedy_after", "steps", "wall_seconds",
    "rollout_tokens_per_second", "train_tokens_per_second", "time_split", "logprob_mismatch_mean_abs",
)  # fmt: skip


def run(folder: Path, name: str, seed: int, *overrides: str) -> dict[str, Any]:
    """One run in a fresh process; its summary."""
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "train", str(RECIPE), f"runs_dir={folder}"]
    command += [f"name={name}", f"seed={seed}", "obs.live=false", *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=1200)
    summary = json.loads((folder / name / "summary.json").read_text())
    return {key: summary[key] for key in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--control-seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        learned = [run(folder, f"seed-{seed}", seed) for seed in arguments.seeds]
        coin = 'rewards=[{type="random"}]'
        control = [run(folder, f"control-{seed}", seed, coin) for seed in arguments.control_seeds]
    result = {
        "command": "python benchmarks/demo.py",
        "demo": learned,
        "random_reward": control,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
