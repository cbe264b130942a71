"""Sluice and TRL's GRPOTrainer side by side: one model, one task, one batch, one seed at a time, in turns.

    python -m benchmarks.trl compare [--seeds 0 1 2] [--updates 40] [--out FILE]
    python -m benchmarks.trl install          # make both environments anew and measure that
    python -m benchmarks.trl gpu --model FOLDER [--trl-python PYTHON] [--out FILE]      # see benchmarks/gpu/README.md

`compare` trains the demo's model (recipes/demo.py after its warm start) on the demo's task. Both sides get the same
Hugging Face folder and the same prompts in the same order, and differ in what DEVIATIONS says. Each run is a process of
its own: ours, theirs, ours, theirs, … Snapshots are written by both, left out of both times, and measured afterwards
on held-out prompts by one engine. The first `compare` makes TRL's environment from requirements.txt beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.rig import command_line, machine, report, say
from benchmarks.trl import environment
from benchmarks.trl.settings import SNAPSHOT, STARTUP, Settings
from recipes import demo, smollm2

from sluice.config.run import RunConfig
from sluice.obs.view import NullView
from sluice.orchestrate import api
from sluice.orchestrate.setup import load_data
from sluice.types import Prompt

HERE = Path(__file__).parent
RUN_SECONDS = 3_000
HELD_OUT = 256
DEVIATIONS = (
    "Sluice takes the sampler's own log-probs as the old policy of the ratio; TRL's generation gives none, so its "
    "ratio is 1 by construction (it takes the trainer's, detached). On the CPU the two differ by 1e-7.",
    "TRL samples with Hugging Face generate: prompts padded on the left, all sequences until the last has ended. "
    "Sluice samples with its embedded engine: continuous batching, prompts of a group computed once.",
    "Sampling noise differs: TRL's is torch's global generator, Sluice's is keyed by (seed, prompt, sample, position).",
    "TRL trains an update in padded micro-batches of --micro-batch answers, Sluice in packed ones of 8,192 tokens and "
    "without a backward pass for groups whose answers are all right or all wrong: their gradient is exactly 0. "
    "A prompt that answers share is computed once. Neither checkpoints activations.",
    "Sluice also appends every episode, reward and disposition to its durable log, publishes checksummed weights, and "
    "measures entropy and the sampler's mismatch in every update. TRL logs means of every tenth update.",
    "TRL's defaults that cost time and have no counterpart are off: bf16 and gradient checkpointing. AdamW and the "
    "linear schedule are handed to it, so that both follow one formula.",
)
GPU_DEVIATIONS = (
    "TRL keeps float32 weights and computes under bfloat16 autocast; Sluice computes on a bfloat16 copy of float32 "
    "masters.",
    "Sluice samples with an SGLang server on the same GPU, TRL with Hugging Face generate: vLLM is not on that host.",
)


# ── the two sides ───────────────────────────────────────────────────────────────────────────────────────


def run_side(side: str, settings: Settings, python: Path, scratch: Path) -> dict[str, Any]:
    """One run in a process of its own; what it printed, and its whole wall and CPU seconds."""
    out = Path(settings.out)
    file = settings.write(scratch / f"{out.name}.json")
    script = ["-m", "benchmarks.trl.ours"] if side == "sluice" else [str(HERE / "theirs.py")]
    environ = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    if side == "trl":
        environ.pop("PYTHONPATH", None)
    say(f"{out.name}: begins")
    with (scratch / f"{out.name}.log").open("w+") as errors:
        child = subprocess.run([str(python), *script, str(file)], env=environ, stdout=subprocess.PIPE, stderr=errors,
                               text=True, timeout=RUN_SECONDS, check=False)  # fmt: skip
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{out.name} failed:\n{errors.read()[-4_000:]}")
    result = json.loads(child.stdout.splitlines()[-1])
    (scratch / f"{out.name}-result.json").write_text(json.dumps(result), encoding="utf-8")
    say(f"{out.name}: {result['updates'][-1][0]:.1f} s wall, {result['updates'][-1][1]:.1f} s CPU for its updates")
    return result


def figures(result: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What the tables show of one run."""
    phases, (wall, cpu) = result["phases"], result["updates"][-1]
    snapshots = phases.get(SNAPSHOT, {"wall": 0.0, "cpu": 0.0})
    generating = phases.get("generation") or phases["rollout"]
    return {
        "end_to_end_seconds": round(result["finished"] - settings.started - snapshots["wall"], 2),
        "end_to_end_cpu_seconds": round(sum(each["cpu"] for each in phases.values()) - snapshots["cpu"], 2),
        "startup_seconds": phases[STARTUP]["wall"],
        "updates_seconds": wall,
        "updates_cpu_seconds": cpu,
        "generation_tokens_per_second": round(result["sampled_tokens"] / generating["wall"]),
        "generation_tokens_per_cpu_second": round(result["sampled_tokens"] / generating["cpu"]),
        "train_tokens_per_second": round(result["trained_tokens"] / phases["train"]["wall"]),
        "train_tokens_per_cpu_second": round(result["trained_tokens"] / phases["train"]["cpu"]),
        "sampled_tokens": result["sampled_tokens"],
        "trained_tokens": result["trained_tokens"],
        "peak_rss_mib": result["peak_rss_mib"],
        "cpu_seconds_by_phase": {name: each["cpu"] for name, each in phases.items()},
    }


# ── task and evaluation ─────────────────────────────────────────────────────────────────────────────────


def write_prompts(prompts: list[Prompt], file: Path) -> Path:
    """Questions and answers, one JSON object a line."""
    rows = [
        {"id": f"row-{number}", "question": prompt.messages[-1].content, "answer": prompt.answer}
        for number, prompt in enumerate(prompts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def start_model(folder: Path) -> RunConfig:
    """The demo up to its first update: the warm-started model is then `folder/start/model-sft`."""
    config = RunConfig.model_validate(
        {**demo.recipe(), "name": "start", "runs_dir": folder, "steps": 0, "obs": {"tensorboard": False}}
    )
    if not (config.folder / "summary.json").exists():
        say("the warm start begins")
        api.train(config, view=NullView(), overwrite=True)
    return config


def evaluator(config: RunConfig, scratch: Path, prompts: list[Prompt], reward: str) -> RunConfig:
    """A configuration that measures a model on `prompts`: two sampled answers to each, and a greedy one."""
    held_out = write_prompts(prompts, scratch / "held-out.jsonl")
    source = {"type": "jsonl", "path": held_out, "columns": {"prompt": "question", "answer": "answer"}}
    return RunConfig.model_validate(
        {
            "threads": config.threads,
            "model": {"path": config.folder},
            "data": {"train": source, "eval": source},
            "rewards": [{"type": "python", "path": f"{HERE / 'reward.py'}:sluice_{reward}"}],
            "rollout": {"sampling": config.rollout.sampling.model_dump()},
            "evaluation": {"samples": 2, "greedy": True},
        }
    )


def curve(config: RunConfig, out: Path, result: dict[str, Any]) -> list[dict[str, float]]:
    """Held-out accuracy of every snapshot, with the seconds of updates it took to get there."""
    points: list[dict[str, float]] = []
    for folder in sorted(out.glob("update-*")):
        update = int(folder.name.removeprefix("update-"))
        found = api.evaluate(config, folder)
        wall, cpu = result["updates"][update - 1]
        point = {"update": update, "seconds": wall, "cpu_seconds": cpu}
        points.append({**point, "accuracy": round(found["accuracy"], 4), "greedy": round(found["greedy"], 4)})
    return points


def reached(points: list[dict[str, float]], accuracy: float, axis: str, start: float) -> float | None:
    """Where the curve, which begins at `start`, first reaches `accuracy`, between two snapshots by a straight line;
    None: never."""
    before = {axis: 0.0, "accuracy": start}
    for point in points:
        if point["accuracy"] >= accuracy:
            share = (accuracy - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return round(before[axis] + share * (point[axis] - before[axis]), 2)
        before = point
    return None


# ── compare ─────────────────────────────────────────────────────────────────────────────────────────────


def compare(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both sides on the CPU, once for each seed."""
    theirs = environment.trl_python()
    start = start_model(arguments.work or scratch)
    data = load_data(start.data, seed=0)
    prompts = list(data.train)
    measuring = evaluator(start, scratch, list(data.held_out)[:HELD_OUT], "right")
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        order = random.Random(seed).sample(prompts, arguments.updates * start.groups_per_step)
        file = write_prompts(order, scratch / f"prompts-{seed}.jsonl")
        row: dict[str, Any] = {"seed": seed}
        for side, python in (("sluice", Path(sys.executable)), ("trl", theirs)):
            settings = Settings(
                started=time.time(), model=str(start.folder / "model-sft"), prompts=str(file),
                out=str(scratch / f"{side}-{seed}"), seed=seed, updates=arguments.updates,
                groups=start.groups_per_step, samples=8, max_new_tokens=start.rollout.sampling.max_new_tokens,
                reward="right", lr=start.train.optimizer.lr, warmup=start.train.optimizer.warmup_steps,
                final_lr_ratio=start.train.optimizer.final_lr_ratio, snapshot_every=arguments.snapshot_every,
                threads=arguments.threads, micro_batch=arguments.micro_batch,
            )  # fmt: skip
            row[side] = (settings, run_side(side, settings, python, scratch))
        runs.append(row)
    say("held-out accuracy of the snapshots")
    start_accuracy = float(api.evaluate(measuring, start.folder / "model-sft")["accuracy"])
    return {**summary(runs, arguments.accuracy, measuring, start_accuracy), "deviations": list(DEVIATIONS)}


def summary(runs: list[dict[str, Any]], accuracy: float, measuring: RunConfig, start: float) -> dict[str, Any]:
    """Figures of every run, means over seeds, and how many times faster Sluice is.

    Args:
        accuracy: to be reached.
        measuring: measures a model.
        start: accuracy of the model before its first update.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        row: dict[str, Any] = {"seed": run["seed"]}
        row["same_prompts"] = run["sluice"][1]["first_prompts"] == run["trl"][1]["first_prompts"]
        for side in ("sluice", "trl"):
            settings, result = run[side]
            points = curve(measuring, Path(settings.out), result)
            row[side] = {
                **figures(result, settings),
                "seconds_to_accuracy": reached(points, accuracy, "seconds", start),
                "cpu_seconds_to_accuracy": reached(points, accuracy, "cpu_seconds", start),
                "curve": points,
                "first_and_last_rewards": [result["rewards"][0], result["rewards"][-1]],
            }
        rows.append(row)
    names = [name for name, value in rows[0]["sluice"].items() if isinstance(value, (int, float))]
    means = {
        side: {name: round(mean(values), 3) for name in names if None not in (values := [r[side][name] for r in rows])}
        for side in ("sluice", "trl")
    }
    ratios: dict[str, float] = {}
    for name in names:
        pairs = [(row["trl"][name], row["sluice"][name]) for row in rows]
        if all(both := [left and right for left, right in pairs]) and both:
            faster = [right / left if "per" in name.split("_") else left / right for left, right in pairs]
            ratios[name] = round(median(faster), 2)
    return {
        "accuracy": accuracy,
        "start_accuracy": round(start, 4),
        "times_better_median": ratios,
        "mean": means,
        "final_accuracy": {side: [row[side]["curve"][-1]["accuracy"] for row in rows] for side in ("sluice", "trl")},
        "mismatch_mean_abs": max(run["sluice"][1]["mismatch_mean_abs"] for run in runs),
        "trl_versions": runs[0]["trl"][1]["versions"],
        "runs": rows,
    }


# ── on one GPU ──────────────────────────────────────────────────────────────────────────────────────────


def compare_on_gpu(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """SmolLM2-135M on one GPU: SGLang samples for Sluice, Hugging Face generate for TRL."""
    recipe = smollm2.gpu_host()
    levels = {"train": smollm2.sums(2, 3_000), "eval_prompts": 48}
    model = arguments.model or Path(recipe["model"]["path"])
    config = RunConfig.model_validate({**recipe, "model": {"path": model}, "data": levels})
    data = load_data(config.data, seed=0)
    measuring = evaluator(config, scratch, list(data.held_out), "last_number")
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        draw = random.Random(seed)  # there are few distinct sums: later passes see them again
        order = [draw.choice(data.train) for _ in range(arguments.updates * config.groups_per_step)]
        file = write_prompts(order, scratch / f"prompts-{seed}.jsonl")
        row: dict[str, Any] = {"seed": seed}
        for side, python in (("sluice", Path(sys.executable)), ("trl", arguments.trl_python)):
            settings = Settings(
                started=time.time(), model=str(model), prompts=str(file), out=str(scratch / f"{side}-{seed}"),
                seed=seed, updates=arguments.updates, groups=config.groups_per_step, samples=8,
                max_new_tokens=config.rollout.sampling.max_new_tokens, reward="last_number",
                lr=config.train.optimizer.lr, warmup=config.train.optimizer.warmup_steps,
                final_lr_ratio=config.train.optimizer.final_lr_ratio, snapshot_every=arguments.snapshot_every,
                threads=arguments.threads, micro_batch=arguments.micro_batch, device="cuda",
                dtype="bfloat16", engine="sglang",
            )  # fmt: skip
            row[side] = (settings, run_side(side, settings, python, scratch))
        runs.append(row)
    begins = float(api.evaluate(measuring, model)["accuracy"])
    return {**summary(runs, arguments.accuracy, measuring, begins), "deviations": [*DEVIATIONS, *GPU_DEVIATIONS]}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = options.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="make both environments anew and measure that")
    for name in ("compare", "gpu"):
        each = commands.add_parser(name)
        each.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        each.add_argument("--updates", type=int, default=40)
        each.add_argument("--snapshot-every", type=int, default=5)
        each.add_argument("--micro-batch", type=int, default=256, help="answers in one pass of TRL's")
        each.add_argument("--threads", type=int, default=1 if name == "compare" else 8)
        each.add_argument("--accuracy", type=float, default=0.8 if name == "compare" else 0.5, help="to be reached")
        each.add_argument("--work", type=Path, help="keep the warm-started model and the runs in this folder")
        each.add_argument("--out", type=Path, help="also write the JSON to this file")
    each.add_argument("--model", type=Path, help="SmolLM2's folder, where it is not in its usual place")
    each.add_argument("--trl-python", type=Path, default=Path(sys.executable), help="the Python that imports TRL")
    arguments = options.parse_args()
    if arguments.command == "install":
        environment.make_ours()
        environment.make_theirs()
        print(json.dumps(environment.measured(), indent=1))
        return
    with tempfile.TemporaryDirectory() as name:
        scratch = arguments.work or Path(name)
        scratch.mkdir(parents=True, exist_ok=True)
        measure = compare if arguments.command == "compare" else compare_on_gpu
        result = measure(arguments, scratch)
    report(
        {
            "command": command_line("trl"),
            **result,
            "installation": environment.measured(),
            **machine(),
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
