"""Every algorithm on the demo task from one fine-tuned model a seed: does it learn, and what does it cost?

    python -m benchmarks.algorithms [--algorithms a,b] [--seeds 0,1,2] [--out FILE] [--jobs 1] [--folder FOLDER]

The task is that of `recipes/demo.py`: two-digit sums by a model that mostly forgets to carry. Its fine-tuning is done
once a seed; every algorithm then takes 12 batches of 32 groups of 8 answers, without an evaluation in between, and is
measured on the 256 held-out questions before and after. Each run is a process of its own on one thread. A finished
run is kept in the folder, so that an interrupted command goes on where it stood; a run whose recipe has changed since
is made again. Prints a table; `--out` writes it as JSON and, beside it, as Markdown.

An algorithm joins by an entry in `benchmarks/algorithm_entries.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.algorithm_entries import ENTRIES, SHARED, Entry

from sluice.config.dump import resolved_json
from sluice.config.load import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes" / "demo.py")
LEARNED = 0.2
"""An algorithm has learnt when sampled held-out accuracy rises by this much on every seed."""
DEADLINE = 1800.0
"""Seconds that one process may take; a run takes about 40 on a core of its own, the fine-tuning about 100."""


# ── one process ─────────────────────────────────────────────────────────────────────────────────────────


def train(recipe: Path, result: Path) -> None:
    """The whole of a child process: train `recipe`, write its figures, and keep its last model beside them."""
    from sluice.orchestrate import api

    configs = [load_recipe(str(each)) for each in (recording(recipe), recipe) if each.exists()]
    summaries = [api.train(config, overwrite=True) for config in configs]
    used = resource.getrusage(resource.RUSAGE_SELF)
    rows = [row for config in configs for row in metrics(config.folder)]
    config, first, last = configs[-1], summaries[0], summaries[-1]
    alone = config.preferences.steps if config.preferences else 0
    figures = {
        "eval_before": first.eval_before,
        "eval_after": last.eval_after,
        "greedy_before": first.greedy_before,
        "greedy_after": last.greedy_after,
        "steps": alone + last.steps,
        "updates": alone + (int(rows[-1]["version/step"]) if last.steps else 0),
        "episodes": sum(row["rollout/episodes"] + row["rollout/groups_dropped"] * 8 for row in rows),
        "wall_seconds": sum(summary.wall_seconds for summary in summaries),
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "recipe": digest(recipe),
    }
    model = sorted((config.folder / "checkpoints").glob("*/model"))[-1]
    shutil.rmtree(result.with_suffix(""), ignore_errors=True)
    shutil.move(str(model), result.with_suffix(""))
    for config in configs:
        shutil.rmtree(config.folder)
    torn = result.with_suffix(".tmp")
    torn.write_text(json.dumps(figures, indent=1) + "\n")
    torn.rename(result)


def spawn(*arguments: str, log: Path) -> None:
    """This program or Sluice in a fresh process on one thread; a failure shows the end of its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=stream, stderr=stream, timeout=DEADLINE,
            check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed; the end of {log}:\n{log.read_text()[-2000:]}")


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def recording(recipe: Path) -> Path:
    """The recipe of the run whose log `recipe` trains on; there is one if its entry has `record`."""
    return recipe.with_name(recipe.name.replace(".recipe.json", ".recording.json"))


def digest(recipe: Path) -> str:
    """Of everything that a run does."""
    recipes = [each.read_bytes() for each in (recipe, recording(recipe)) if each.exists()]
    return hashlib.sha256(b"".join(recipes)).hexdigest()[:16]


# ── all runs ────────────────────────────────────────────────────────────────────────────────────────────


def fine_tuned(folder: Path, seed: int) -> Path:
    """The model that every algorithm of a seed starts from; made on first use."""
    model = folder / f"start-{seed}"
    if not model.exists():
        torn = folder / f".start-{seed}.tmp"
        shutil.rmtree(torn, ignore_errors=True)
        command = ["-c", "from sluice.cli import main; main()", "sft", RECIPE, f"seed={seed}", "obs.live=false"]
        spawn(*command, "--out", str(torn), log=folder / f"start-{seed}.log")
        torn.rename(model)
    return model


def write_recipe(folder: Path, name: str, seed: int) -> Path:
    """The resolved recipe of one run. A setting that is wrong is told here, before anything is trained."""
    entry, runs, recorded = ENTRIES[name], folder / "runs", f"{name}-{seed}-recorded"
    folders = {
        "{start}": folder / f"start-{seed}",
        "{trained}": folder / f"{entry.after}-{seed}",
        "{recorded}": runs / recorded,
    }

    def write(target: Path, overrides: Sequence[str], run: str) -> None:
        place = [f"model.path={folders['{start}']}", f"seed={seed}", f"name={run}", f"runs_dir={runs}"]
        own = list(overrides)
        for mark, path in folders.items():
            own = [text.replace(mark, str(path)) for text in own]
        target.write_text(resolved_json(load_recipe(RECIPE, [*SHARED, *own, *place])))

    recipe = folder / f"{name}-{seed}.recipe.json"
    write(recipe, entry.overrides, f"{name}-{seed}")
    if entry.record:
        write(recording(recipe), entry.record, recorded)
    else:
        recording(recipe).unlink(missing_ok=True)
    return recipe


def run(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """The figures of one algorithm on one seed: those that are kept, or those of a new run."""
    recipe, result = folder / f"{name}-{seed}.recipe.json", folder / f"{name}-{seed}.json"
    kept = json.loads(result.read_text()) if result.exists() else {}
    if kept.get("recipe") != digest(recipe):
        began = time.monotonic()
        child = ["-m", "benchmarks.algorithms", "--run", str(recipe), str(result)]
        spawn(*child, log=folder / f"{name}-{seed}.log")
        kept = json.loads(result.read_text())
        after, took = kept["eval_after"], time.monotonic() - began
        print(f"{name}, seed {seed}: {kept['eval_before']:.3f} -> {after:.3f} in {took:.0f} s", file=sys.stderr)
    return {"seed": seed} | {key: value for key, value in kept.items() if key != "recipe"}


def run_all(folder: Path, names: Sequence[str], seeds: Sequence[int], jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Every algorithm on every seed; those that start from another's model come after it."""
    wanted = dict.fromkeys([*names, *(ENTRIES[name].after for name in names if ENTRIES[name].after)])
    waves = [[n for n in wanted if not ENTRIES[n].after], [n for n in wanted if ENTRIES[n].after]]
    for name in wanted:
        for seed in seeds:
            write_recipe(folder, name, seed)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda seed: fine_tuned(folder, seed), seeds))
        for wave in waves:
            pairs = [(name, seed) for seed in seeds for name in wave]
            done = pool.map(lambda pair: run(folder, *pair), pairs)
            results |= dict(zip(pairs, done, strict=True))
    return {name: [results[name, seed] for seed in seeds] for name in names}


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────


def row(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One algorithm's line: figures of each seed, in their order, and whether it learnt."""
    entry: Entry = ENTRIES[name]
    gains = [each["eval_after"] - each["eval_before"] for each in runs]
    return {
        "algorithm": name,
        "learns": all(gain >= LEARNED for gain in gains),
        "should_not_learn": entry.should_not_learn,
        "settings": entry.settings,
        "overrides": list(entry.overrides),
        "runs": list(runs),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; figures of several seeds stand side by side."""

    def each(line: dict[str, Any], key: str, form: str) -> str:
        return " ".join(format(run[key], form) for run in line["runs"])

    def mean(line: dict[str, Any], key: str) -> float:
        return sum(run[key] for run in line["runs"]) / len(line["runs"])

    head = (
        "algorithm", "sampled before", "sampled after", "greedy before", "greedy after", "learns",
        "steps (updates)", "wall s", "CPU s", "settings", "why it should not learn",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for line in rows:
        first = line["runs"][0]
        cells = (
            line["algorithm"],
            *(each(line, key, ".3f") for key in ("eval_before", "eval_after", "greedy_before", "greedy_after")),
            "yes" if line["learns"] else "no",
            f"{first['steps']} ({first['updates']})",
            f"{mean(line, 'wall_seconds'):.0f}",
            f"{mean(line, 'cpu_seconds'):.0f}",
            line["settings"],
            line["should_not_learn"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--algorithms", default=",".join(ENTRIES), help="names of entries, with commas between")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, help="write the table to this JSON file, and as .md beside it")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "algorithms", help="where finished runs are kept"
    )
    parser.add_argument("--run", type=Path, nargs=2, metavar=("RECIPE", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        train(*arguments.run)
        return
    names = arguments.algorithms.split(",")
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        parser.error(f"there is no entry {unknown[0]!r}; there are {', '.join(ENTRIES)}")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = run_all(folder, names, [int(seed) for seed in arguments.seeds.split(",")], arguments.jobs)
    rows = [row(name, results[name]) for name in names]
    if arguments.out:
        table = {
            "command": "python -m benchmarks.algorithms " + " ".join(sys.argv[1:]),
            "learned_means": f"sampled accuracy rises by {LEARNED} or more on every seed",
            "shared_overrides": list(SHARED),
            "rows": rows,
            "versions": {package: version(package) for package in ("torch", "transformers", "numpy")},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
