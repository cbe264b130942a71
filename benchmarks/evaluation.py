"""Seconds of a run that is evaluated after every batch: the loop waits for each evaluation, or goes on beside it.

    python -m benchmarks.evaluation [--batches 8] [--prompts 64] [--rounds 2] [--lags 0 1] [--workloads NAME …]
        [--out FILE]

Real runs, a process each, the ways in turn in every round, so that the load of the machine meets all of them alike.
Model, engine server, trainer and agents are those of `benchmarks.irregular`; held-out prompts are answered by the same
agents, as long as the same draws say whichever way is measured. Seconds are from the second batch to the last
evaluation: start-up and the first batch are left out. Prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.irregular import AGENT, HEAVY, RECIPE, WORKLOADS
from benchmarks.rig import command_line, machine, parser, report, say
from benchmarks.simulated_runs import GROUPS, OVERRIDES, SAMPLES

WAYS: dict[str, tuple[str, ...]] = {
    "blocking": ("evaluation.beside=false",),
    "beside": ("evaluation.beside=true",),
    "own server": ("evaluation.servers=1",),
}


def train(folder: Path, name: str, workload: str, words: list[str]) -> list[dict[str, float]]:
    """The rows of metrics of one run."""
    params = ",".join(f"{key}={value}" for key, value in WORKLOADS[workload].items())
    words = [
        f"runs_dir={folder}", f"name={name}", *OVERRIDES, "threads=1", "evaluation.every=1", "evaluation.greedy=false",
        f'rollout.runner={{type="python",path="{AGENT}",params={{{params}}}}}', *words,
    ]  # fmt: skip
    if workload == "training-bound":
        words += HEAVY
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "train", str(RECIPE), *words]
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=1200)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def figures(rounds: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Of the runs of one way. The first row holds what came before the first batch, and is left out."""
    seconds = [sum(v for row in rows[1:] for k, v in row.items() if k.startswith("time/")) for rows in rounds]

    def mean(name: str) -> float:
        return round(float(np.mean([row.get(name, 0.0) for rows in rounds for row in rows[1:]])), 3)

    return {
        "run_seconds": [round(each, 2) for each in seconds],
        "evaluation_seconds": mean("eval/seconds"),
        "waited_for_it_seconds": mean("time/evaluate"),
        "rollout_seconds": mean("time/rollout"),
        "train_seconds": round(mean("time/score") + mean("time/train"), 3),
    }


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--batches", type=int, default=8)
    arguments_of.add_argument("--prompts", type=int, default=64, help="held out, answered once at every evaluation")
    arguments_of.add_argument("--rounds", type=int, default=2)
    arguments_of.add_argument("--lags", type=int, nargs="+", default=[0, 1])
    arguments_of.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=["tools", "training-bound"])
    arguments_of.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    arguments_of.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = arguments_of.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for workload in arguments.workloads:
            for lag in arguments.lags:
                found: dict[str, list[list[dict[str, float]]]] = {way: [] for way in arguments.ways}
                for number in range(arguments.rounds):
                    for way in arguments.ways:
                        say(f"{workload}, lag {lag}, {way}, round {number + 1}")
                        words = [f"steps={arguments.batches}", f"data.eval_prompts={arguments.prompts}", *WAYS[way]]
                        name = f"{workload}-{lag}-{way.replace(' ', '-')}-{number}"
                        rows = train(Path(scratch), name, workload, [*words, f"data.gate.max_lag={lag}"])
                        found[way].append(rows)
                ways = {way: figures(rounds) for way, rounds in found.items()}
                first = ways[arguments.ways[0]]
                for row in ways.values():
                    row["of_the_first"] = round(sum(row["run_seconds"]) / sum(first["run_seconds"]), 3)
                results[f"{workload}, lag {lag}"] = ways
    shape = {"groups": GROUPS, "samples": SAMPLES, "batches": arguments.batches, "held_out": arguments.prompts}
    report({"command": command_line("evaluation"), **shape, "runs": results, **machine()}, arguments.out)


if __name__ == "__main__":
    main()
