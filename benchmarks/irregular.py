"""Tokens trained a second, with rollout that runs ahead and without, on the same hardware: when asynchrony pays.

    python -m benchmarks.irregular [--batches 12] [--lags 0 1 4] [--workloads NAME …] [--seed 0] [--out FILE]

Real runs, one after the other, each in a process of its own: a model of the demo's size with random weights, a learning
rate that changes nothing, one engine server beside a trainer of one thread. Answers are as long, and tools take as
long, as a seeded draw says (`benchmarks/irregular_agent.py`), the same for every lag. Workloads:

* `tools`: two answers with p99 / p50 = 20 and a tool between them, whose time has that tail too;
* `lengths`: one such answer, no tool;
* `regular`: answers of one length, no tool;
* `training-bound`: short answers of one length behind long prompts, which are trained on but sampled once.

Tokens are those that were sampled and in the loss: what the gate masks does not count. The first two batches are left
out. Prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rig import command_line, machine, parser, report, say
from benchmarks.simulated_runs import GROUPS, OVERRIDES, SAMPLES, WARMUP, Run, measured

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.py"
AGENT = f"{Path(__file__).parent / 'irregular_agent.py'}:Irregular"
QUIET: dict[str, Any] = {
    "median": 40,
    "tail": 1.0,
    "limit": 400,
    "turns": 1,
    "context": 0,
    "tool_seconds": 0.0,
    "tool_limit": 10.0,
}
WORKLOADS: dict[str, dict[str, Any]] = {
    "tools": {**QUIET, "median": 16, "tail": 20.0, "limit": 320, "turns": 2, "tool_seconds": 0.3},
    "lengths": {**QUIET, "median": 24, "tail": 20.0},
    "regular": QUIET,
    "training-bound": {**QUIET, "median": 8, "context": 256},
}
HEAVY = ("train.share_prompts=never", "train.micro_batch_tokens=1024", 'algorithm.kl={coefficient=0.01,where="loss"}')
"""What makes training the longer part: every prompt token computed again for each answer, small passes, a reference."""


def train(folder: Path, name: str, workload: str, lag: int, batches: int, seed: int) -> Run:
    """One run; its metrics."""
    params = ",".join(f"{key}={value}" for key, value in WORKLOADS[workload].items())
    words = [
        f"runs_dir={folder}", f"name={name}", f"seed={seed}", f"steps={batches}", *OVERRIDES, "threads=1",
        f"data.gate.max_lag={lag}", f'rollout.runner={{type="python",path="{AGENT}",params={{{params}}}}}',
    ]  # fmt: skip
    if workload == "training-bound":
        words += HEAVY
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "train", str(RECIPE), *words]
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=1200)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return Run(rows, {0: [(0, 0.0)]})


def figures(run: Run) -> dict[str, float]:
    """Of the batches that count."""
    found = measured(run)
    idle = {"engine_idle": run.mean("engine/idle_share")}
    kept = (
        "trained_tokens_per_second",
        "seconds_per_batch",
        "trainer_idle",
        "stale_tokens_share",
        "lag_mean",
        "lag_max",
    )
    return {name: round(value, 4) for name, value in ({name: found[name] for name in kept} | idle).items()}


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--batches", type=int, default=12)
    arguments_of.add_argument("--lags", type=int, nargs="+", default=[0, 1, 4])
    arguments_of.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=list(WORKLOADS))
    arguments_of.add_argument("--seed", type=int, default=0)
    arguments_of.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = arguments_of.parse_args()
    if arguments.batches <= WARMUP:
        raise SystemExit(f"--batches {arguments.batches}: the first {WARMUP} are left out")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for workload in arguments.workloads:
            rows: dict[str, dict[str, float]] = {}
            for lag in arguments.lags:
                say(f"{workload}, lag {lag}")
                run = train(Path(scratch), f"{workload}-{lag}", workload, lag, arguments.batches, arguments.seed)
                rows[f"lag {lag}"] = figures(run)
            first = rows[f"lag {arguments.lags[0]}"]["trained_tokens_per_second"]
            for row in rows.values():
                row["times_the_first"] = round(row["trained_tokens_per_second"] / first, 2)
            results[workload] = {"agent": WORKLOADS[workload], **rows}
    shape = {"groups": GROUPS, "samples": SAMPLES, "batches": arguments.batches, "left_out": WARMUP}
    report({"command": command_line("irregular"), **shape, "workloads": results, **machine()}, arguments.out)


if __name__ == "__main__":
    main()
