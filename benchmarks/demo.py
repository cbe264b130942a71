"""The demo on several seeds, and with a random reward: held-out accuracy before and after RL.

    python -m benchmarks.demo [--seeds 0 1 2] [--control-seeds 0 1] [--out FILE]

Each run is a process of its own, one after the other, from random weights: `sluice train recipes/demo.py`. The
control differs in the reward alone, a seeded coin. Prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rig import command_line, machine, parser, report

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
    flags = parser(__doc__)
    flags.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    flags.add_argument("--control-seeds", type=int, nargs="*", default=[0, 1])
    flags.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = flags.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        learned = [run(folder, f"seed-{seed}", seed) for seed in arguments.seeds]
        coin = 'rewards=[{type="random"}]'
        control = [run(folder, f"control-{seed}", seed, coin) for seed in arguments.control_seeds]
    result = {
        "command": command_line("demo"),
        "demo": learned,
        "random_reward": control,
        **machine(),
    }
    report(result, arguments.out)


if __name__ == "__main__":
    main()
