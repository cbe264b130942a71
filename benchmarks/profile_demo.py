"""Where a run of the demo spends its CPU time: by phase, by room of the code, by function.

    python -m benchmarks.profile_demo [--steps 12] [--top 25] [--out FILE] [--runs FOLDER]

The demo's recipe runs twice from the same warm start: once as it is, for seconds by phase, and once under Python's
profiler from its first batch on, which makes calls dearer but tells functions apart. A room is a folder of `sluice`;
what torch and others do counts for the room that asked for it. One thread. Prints one JSON object.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.rig import command_line, machine, parser, report, say
from recipes import demo

import sluice
from sluice.config.run import RunConfig
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api

HOME = os.path.dirname(os.path.abspath(sluice.__file__)) + os.sep
Function = tuple[str, int, str]


def configuration(steps: int, runs: Path, name: str, model: Path | None) -> RunConfig:
    """The demo for a number of steps, without evaluation; from a model that is there, or with its warm start."""
    changes: dict[str, Any] = {
        "name": name, "runs_dir": runs, "threads": 1, "steps": steps, "evaluation": {"every": 0},
        "obs": {"tensorboard": False, "report": False},
    }  # fmt: skip
    recipe = {**demo.recipe(), **changes}
    recipe["data"] = {**recipe["data"], "eval_prompts": 0}
    if model is not None:
        recipe = {key: value for key, value in recipe.items() if key != "warm_start"} | {"model": {"path": model}}
    return RunConfig.model_validate(recipe)


class FromTheFirstBatch(NullView):
    """Starts the profiler when the loop begins: what a run loads before is told by `start_cpu_seconds`."""

    def __init__(self, profile: cProfile.Profile) -> None:
        self._profile = profile
        self.started = 0.0

    def phase(self, name: str) -> None:
        if name == "rollout" and not self.started:
            self.started = time.process_time()
            self._profile.enable()


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def room(function: Function) -> str | None:
    """The folder of `sluice` that a function is in; None for code of others."""
    file = function[0]
    return file.removeprefix(HOME).split(os.sep)[0].removesuffix(".py") if file.startswith(HOME) else None


def by_room(stats: dict[Function, Any]) -> dict[str, float]:
    """Seconds of each room, code of others shared out over the rooms that called it, by time."""
    shares: dict[Function, dict[str, float]] = {}

    def of(function: Function, path: frozenset[Function]) -> dict[str, float]:
        """Which part of a function's own time is whose."""
        if (own := room(function)) is not None:
            return {own: 1.0}
        if function in shares or function in path:
            return shares.get(function, {"elsewhere": 1.0})
        callers = stats[function][4]
        weights = {caller: max(times[3], 1e-12) for caller, times in callers.items()}
        total, found = sum(weights.values()), dict[str, float]()
        for caller, weight in weights.items():
            for name, share in of(caller, path | {function}).items():
                found[name] = found.get(name, 0.0) + share * weight / total
        shares[function] = found or {"elsewhere": 1.0}
        return shares[function]

    rooms: dict[str, float] = {}
    for function, (_, _, own, _, _) in stats.items():
        for name, share in of(function, frozenset()).items():
            rooms[name] = rooms.get(name, 0.0) + share * own
    return dict(sorted(rooms.items(), key=lambda item: -item[1]))


def label(function: Function) -> str:
    file, line, name = function
    if file.startswith(HOME):
        return f"{file.removeprefix(HOME)}:{line} {name}"
    return name if file == "~" else f"{os.sep.join(file.split(os.sep)[-2:])}:{line} {name}"


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--steps", type=int, default=12)
    arguments_of.add_argument("--top", type=int, default=25, help="functions that are told")
    arguments_of.add_argument("--runs", type=Path, help="folder for the runs; default: a temporary one")
    arguments_of.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = arguments_of.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        runs = arguments.runs or Path(name)
        say("the warm start begins")
        start = configuration(0, runs, "start", None)
        api.train(start, view=NullView(), overwrite=True)
        model = start.folder / "model-sft"
        plain = configuration(arguments.steps, runs, "plain", model)
        say("the run begins")
        cpu = seconds(lambda: api.train(plain, view=NullView(), overwrite=True))
        rows = read_metrics(plain.folder / "metrics.jsonl")[1:]  # the first batch also warms up
        phases: dict[str, float] = {}
        for row in rows:
            for key, value in row.items():
                if key.startswith("time/"):
                    phases[key.removeprefix("time/")] = phases.get(key.removeprefix("time/"), 0.0) + (value or 0.0)
        say("the run under the profiler begins")
        profile = cProfile.Profile(time.process_time)
        view, begin = FromTheFirstBatch(profile), time.process_time()
        api.train(configuration(arguments.steps, runs, "profiled", model), view=view, overwrite=True)
        profile.disable()
    stats: dict[Function, Any] = pstats.Stats(profile).stats  # pyright: ignore[reportAttributeAccessIssue]
    own = sorted(stats.items(), key=lambda item: -item[1][2])[: arguments.top]
    report(
        {
            "command": command_line("profile_demo"),
            "steps": arguments.steps,
            "cpu_seconds": round(cpu, 2),
            "start_cpu_seconds": round(view.started - begin, 2),
            "wall_seconds_per_step_by_phase": {key: round(value / len(rows), 4) for key, value in phases.items()},
            "profiled_cpu_seconds": round(sum(each[2] for each in stats.values()), 2),
            "profiled_cpu_seconds_by_room": {key: round(value, 2) for key, value in by_room(stats).items()},
            "functions": [
                {"function": label(function), "calls": calls, "own_cpu_seconds": round(time_, 3)}
                for function, (calls, _, time_, _, _) in own
            ],
            **machine(),
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
