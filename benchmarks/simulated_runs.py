"""Real runs of the demo's size beside simulated ones, for `python -m benchmarks.simulate check`.

The recipe is the demo without its warm start, at a learning rate that changes nothing: a model of random weights ends
an answer at about every place with the same chance, so lengths are geometric, with a tail, and the same throughout.
The engine is a server in a process of its own. The simulator is given the lengths of every group and the mean times of
training and publishing of the run that it imitates. What it is not given is when anything happens: seconds of a
batch, the trainer's waiting, lags and stale tokens are what is compared.

The pace of the engine, in two ways. `calibrated`: least squares over the episodes of the run `lag-0`, which all start
together, so that how many are decoded at each step of each follows from the lengths. `own`: the same, times the factor
that gives the mean duration of an episode in the run itself: on a machine that others use too, or where trainer and
engine share cores, two runs are not equally fast.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.simulator import Lengths, Outlook, World, simulate

from sluice.config.data import GateConfig, OnStale
from sluice.log.reader import LogReader
from sluice.log.records import EpisodeRecord, Kind

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.py"
GROUPS, SAMPLES, WARMUP = 8, 8, 2
"""Groups a batch, episodes a group; batches that are left out of the figures."""
OVERRIDES = (
    "obs.live=false", "obs.tensorboard=false", "warm_start=none", "data.eval_prompts=0", "evaluation.every=0",
    "checkpoint.every=0", 'rewards=[{type="random"}]', "train.optimizer.lr=1e-9", "rollout.embedded.servers=1",
    "model.scratch.architecture.max_position_embeddings=512", "rollout.sampling.max_new_tokens=400",
    f"groups_per_step={GROUPS}", f"data.strategy.samples={SAMPLES}",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A run that is made and imitated."""

    gate: GateConfig
    slots: int = 256

    @property
    def overrides(self) -> list[str]:
        gate = self.gate.model_dump(mode="json", exclude_none=True)
        found = [f"data.gate.{key}={value}" for key, value in gate.items()]
        return [*found, f"rollout.embedded.max_running={self.slots}"]


CASES = {
    "lag-0": Case(GateConfig()),
    "lag-2": Case(GateConfig(max_lag=2)),
    "lag-0, 16 slots": Case(GateConfig(), slots=16),
    "lag-2, 16 slots": Case(GateConfig(max_lag=2), slots=16),
    "lag-1, oversample 3, drop, 16 slots": Case(GateConfig(max_lag=1, on_stale=OnStale.DROP, oversample=3.0), slots=16),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a real run left: a row of metrics a batch, and by group its members' (tokens, seconds)."""

    rows: list[dict[str, float]]
    groups: dict[int, list[tuple[int, float]]]

    def mean(self, *names: str) -> float:
        """Mean of a sum of metrics over the batches that count."""
        return float(np.mean([sum(row.get(name, 0.0) for name in names) for row in self.rows[WARMUP:]]))

    @property
    def episode_seconds(self) -> float:
        return float(np.mean([seconds for group in self.groups.values() for _, seconds in group]))


def run(folder: Path, name: str, case: Case, batches: int) -> Run:
    """Make the run in a process of its own, and read its metrics and its log."""
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "train", str(RECIPE)]
    command += [f"runs_dir={folder}", f"name={name}", f"steps={batches}", *OVERRIDES, *case.overrides]
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=1200)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    groups: dict[int, list[tuple[int, float]]] = {}
    for entry in LogReader(folder / name / "log").read(kinds={Kind.EPISODE}):
        assert isinstance(entry.record, EpisodeRecord)  # the only kind asked for
        episode = entry.record.episode
        ordinal = int(episode.group_id.removeprefix("g"))
        groups.setdefault(ordinal, []).append((episode.num_sampled_tokens, float(episode.info["seconds"])))
    return Run(rows, groups)


def calibrate(found: Run) -> tuple[float, float, float]:
    """Seconds of a request, of a decoding step, and of each sequence in it; from a run whose batches start as one."""
    features: list[tuple[float, float, float]] = []
    seconds: list[float] = []
    for batch in range(WARMUP, len(found.rows)):
        members = [one for g in range(batch * GROUPS, (batch + 1) * GROUPS) for one in found.groups[g]]
        lengths = np.sort([tokens for tokens, _ in members])
        active = len(lengths) - np.searchsorted(lengths, np.arange(lengths[-1]), side="right")
        decoded = np.concatenate([[0], np.cumsum(active)])
        features += [(1.0, float(tokens), float(decoded[tokens])) for tokens, _ in members]
        seconds += [each for _, each in members]
    solved = np.linalg.lstsq(np.array(features), np.array(seconds), rcond=None)[0]
    request, step, sequence = (max(0.0, float(each)) for each in solved)
    return request, step, sequence


def imitate(case: Case, found: Run, pace: tuple[float, float, float]) -> World:
    """The world that the run was in, as far as it is measured."""
    lengths = tuple(tuple(tokens for tokens, _ in found.groups[g]) for g in sorted(found.groups))
    request, step, sequence = pace
    return World(
        1, case.slots, GROUPS, case.gate, samples=SAMPLES, lengths=Lengths(measured=lengths),
        step_seconds=step, sequence_seconds=sequence, request_seconds=request,
        train_seconds=found.mean("time/score", "time/train", "time/other"), publish_seconds=found.mean("time/publish"),
        batches=len(found.rows), warmup=WARMUP, finite=True,
    )  # fmt: skip


def episode_seconds(outlook: Outlook) -> float:
    """Mean time from the dispatch of an episode to its end."""
    return outlook.episode_seconds / (len(outlook.world.lengths.measured) * SAMPLES)


def own_pace(case: Case, found: Run, pace: tuple[float, float, float]) -> tuple[float, float, float]:
    """`pace` times the factor at which simulated episodes take as long as the run's."""
    low, high = 0.05, 20.0
    for _ in range(24):
        middle = (low * high) ** 0.5
        world = imitate(case, found, (middle * pace[0], middle * pace[1], middle * pace[2]))
        low, high = (middle, high) if episode_seconds(simulate(world)) < found.episode_seconds else (low, middle)
    factor = (low * high) ** 0.5
    return factor * pace[0], factor * pace[1], factor * pace[2]


def measured(found: Run) -> dict[str, float]:
    """What is compared, of the real run."""
    times = [f"time/{name}" for name in ("rollout", "score", "train", "publish", "other")]
    seconds = found.mean(*times)
    tokens, stale = found.mean("rollout/response_tokens") * GROUPS * SAMPLES, found.mean("gate/masked_tokens")
    return {
        "seconds_per_batch": seconds,
        "trainer_idle": found.mean("time/rollout") / seconds,
        "episode_seconds": found.episode_seconds,
        "trained_tokens_per_second": (tokens - stale) / seconds,
        "stale_tokens_share": stale / tokens,
        "lag_mean": found.mean("gate/lag_mean"),
        "lag_max": max(row["gate/lag_max"] for row in found.rows[WARMUP:]),
    }


def simulated(outlook: Outlook) -> dict[str, float]:
    """The same of a simulated run."""
    figures, judged = outlook.figures(), outlook.window.judged
    stale = figures["tokens_masked"] + figures["tokens_dropped"]
    return {
        "seconds_per_batch": figures["seconds_per_batch"],
        "trainer_idle": figures["trainer_idle"],
        "episode_seconds": episode_seconds(outlook),
        "trained_tokens_per_second": figures["trained_tokens_per_second"],
        "stale_tokens_share": stale / (stale + figures["tokens_trained"]),
        "lag_mean": sum(lag * count for lag, count in judged.items()) / judged.total(),
        "lag_max": float(figures["lag_max_seen"]),
        "slot_idle": figures["slot_idle"],
    }


def compare(name: str, case: Case, found: Run, pace: tuple[float, float, float]) -> dict[str, Any]:
    """One run, measured and simulated."""
    own = own_pace(case, found, pace)
    return {
        "run": name,
        "gate": case.gate.model_dump(mode="json", exclude_none=True),
        "slots": case.slots,
        "given": {
            "train_seconds": found.mean("time/score", "time/train", "time/other"),
            "publish_seconds": found.mean("time/publish"),
            "pace_calibrated": pace,
            "pace_own": own,
        },
        "measured": measured(found),
        "simulated_own_pace": simulated(simulate(imitate(case, found, own))),
        "simulated_calibrated_pace": simulated(simulate(imitate(case, found, pace))),
    }


def check(batches: int) -> dict[str, Any]:
    """Make all runs, calibrate by the first, imitate each."""
    loads = [os.getloadavg()[0] / (os.cpu_count() or 1)]
    with tempfile.TemporaryDirectory() as scratch:
        runs: dict[str, Run] = {}
        for number, (name, case) in enumerate(CASES.items()):
            runs[name] = run(Path(scratch), f"run-{number}", case, batches)
            loads.append(os.getloadavg()[0] / (os.cpu_count() or 1))
    pace = calibrate(runs["lag-0"])
    lengths = np.array([tokens for group in runs["lag-0"].groups.values() for tokens, _ in group])
    return {
        "command": f"python -m benchmarks.simulate check --batches {batches}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_per_core": loads,
        "lengths": {f"p{p}": float(np.percentile(lengths, p)) for p in (10, 50, 90, 99, 100)},
        "runs": [compare(name, case, runs[name], pace) for name, case in CASES.items()],
    }
