"""SGLang and the trainer on one GPU, with a real model: learning, rollout speed, prefill and decode apart.

    python -m benchmarks.gpu_sglang train   --out DIR [--recipe recipes/smollm2.py] [KEY=VALUE ...]
    python -m benchmarks.gpu_sglang rollout --out DIR [--recipe ...] [--prompts 64] [--samples 8] [--rounds 3]
    python -m benchmarks.gpu_sglang pd      --out DIR [--recipe ...] [--conversations 32] [--devices 0 1] [...]

`train` runs the recipe; DIR also gets the learning curve as PNG. `rollout` has one engine answer the same prompts
twice, asked directly over HTTP and through Sluice's fleet, router and single-turn runner. `pd` compares one regular
engine with one prefill and one decode engine on the same GPU, behind the router both times: greedy tokens of single
requests, then throughput and time to the first token of many long conversations. Each prints one JSON object and writes
it. `--cpu-smoke` is the same with a tiny random model and SGLang's CPU build: it shows that the command works, no more.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from benchmarks.rig import Served, command_line, machine, parser, report, served, spread
from tests.tiny import merge, tiny

from sluice.config.load import load_recipe
from sluice.config.run import RunConfig
from sluice.config.sizes import sized
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api
from sluice.orchestrate.setup import load_data
from sluice.rollout.engines.base import GenerateRequest
from sluice.rollout.runners.base import EpisodeRequest, turn_noise
from sluice.rollout.runners.single import SingleTurn
from sluice.types import Ids, SamplingParams

KEPT_ARGS = 262_144
"""KV tokens of each engine in `pd`: two engines that start on one GPU at a time cannot both go by its free memory."""


# ── train ───────────────────────────────────────────────────────────────────────────────────────────────


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the recipe and gather what the run folder says."""
    config = recipe(arguments)
    begin = time.monotonic()
    summary = api.train(config, overwrite=True, view=None if arguments.show else NullView())
    wall = time.monotonic() - begin
    rows = read_metrics(config.folder / "metrics.jsonl")
    curve = {
        "step": [row["step"] for row in rows],
        "reward": [row.get("reward/mean") for row in rows],
        "mismatch": [row.get("mismatch/mean_abs") for row in rows],
        "held_out": [[row["step"], row["eval/accuracy"]] for row in rows if row.get("eval/accuracy") is not None],
        "greedy": [[row["step"], row["eval/greedy"]] for row in rows if row.get("eval/greedy") is not None],
    }
    curve["held_out"].insert(0, [0, summary.eval_before])
    if summary.greedy_before is not None:
        curve["greedy"].insert(0, [0, summary.greedy_before])
    phases: dict[str, list[float]] = {}
    for row in rows[1:]:  # the first step also warms up
        for name, value in row.items():
            if name.startswith("time/") and value is not None:
                phases.setdefault(name.removeprefix("time/"), []).append(float(value))
    result = {
        "run": config.name,
        "held_out_before": summary.eval_before,
        "held_out_after": summary.eval_after,
        "greedy_before": summary.greedy_before,
        "greedy_after": summary.greedy_after,
        "steps": summary.steps,
        "wall_seconds": round(wall, 1),
        "seconds_per_step_by_phase": {name: round(float(np.mean(each)), 4) for name, each in phases.items()},
        "rollout_tokens_per_second": summary.rollout_tokens_per_second,
        "train_tokens_per_second": summary.train_tokens_per_second,
        "mismatch_mean_abs": summary.logprob_mismatch_mean_abs,
        "batches_per_second": round((len(rows) - 1) / wall_of(rows[1:]), 4),
        "median_after_the_first": medians(rows[1:]),
        "last_row": rows[-1],
        "curve": curve,
    }
    if arguments.out is not None:
        plot(curve, arguments.out / f"{config.name}-curve.png")
    return result


def wall_of(rows: Sequence[Any]) -> float:
    """Seconds of batches, without those of evaluations and checkpoints."""
    outside = ("time/evaluate", "time/checkpoint")
    return sum(v or 0.0 for row in rows for k, v in row.items() if k.startswith("time/") and k not in outside)


def medians(rows: Sequence[Any]) -> dict[str, float]:
    """Of what a batch costs: seconds of each switch of a shared device, memory, idle engines, the trainer's waiting."""
    found: dict[str, list[float]] = {}
    for row in rows:
        wall = wall_of([row])
        found.setdefault("trainer_idle_share", []).append((row.get("time/rollout") or 0.0) / wall)
        for name, value in row.items():
            if name.startswith(("switch/", "memory/")) or name in (
                "engine/idle_share",
                "gate/lag_mean",
                "gate/lag_max",
            ):
                found.setdefault(name, []).append(value)
    return {name: round(float(np.median(values)), 4) for name, values in sorted(found.items())}


def plot(curve: dict[str, Any], file: Path) -> None:
    """Reward of training batches and held-out accuracy over steps."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(curve["step"], curve["reward"], color="0.7", label="reward of the batch")
    for name, colour in (("held_out", "tab:blue"), ("greedy", "tab:green")):
        if curve[name]:
            axes.plot(*zip(*curve[name], strict=True), "o-", color=colour, label=name.replace("_", " "))
    axes.set(xlabel="step", ylim=(0, 1))
    axes.legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


# ── rollout ─────────────────────────────────────────────────────────────────────────────────────────────


def rollout(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the same engine, asked directly and through Sluice, in turns."""
    config = recipe(arguments, {"rollout": {"router": {"use": "always"}}})
    prompts = load_data(config.data, seed=config.seed).train[: arguments.prompts]
    return asyncio.run(both_ways(config, prompts, arguments))


async def both_ways(config: RunConfig, prompts: Sequence[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    async with served(config) as rig:
        sampling = config.rollout.sampling.params(eos=rig.chat.eos)
        runner = SingleTurn(rig.fleet, rig.chat, context_length=rig.context_length)
        jobs = [
            EpisodeRequest(f"b.{p}.{k}", f"b.{p}", prompt, sampling, turn_noise(0, p, k))
            for p, prompt in enumerate(prompts)
            for k in range(arguments.samples)
        ]
        ids = [rig.chat.prompt_ids(job.prompt) for job in jobs]
        direct: list[tuple[int, float]] = []
        through: list[tuple[int, float]] = []
        ask = direct_aiohttp if arguments.client == "aiohttp" else direct_httpx
        for number in range(arguments.rounds + 1):
            one = await ask(rig.url(), ids, sampling)
            two = await through_sluice(runner, jobs, number)
            if number:  # the first round warms up
                direct.append(one)
                through.append(two)
        figures = rig.fleet.figures()
    speeds = {name: [n / s for n, s in each] for name, each in (("direct", direct), ("sluice", through))}
    median = {name: float(np.median(each)) for name, each in speeds.items()}
    return {
        "engine": rig.engine_version,
        "requests": len(jobs),
        "direct_client": arguments.client,
        "tokens_per_second": {name: [round(value) for value in each] for name, each in speeds.items()},
        "tokens": {"direct": [n for n, _ in direct], "sluice": [n for n, _ in through]},
        "ratio": round(median["sluice"] / median["direct"], 3),
        "fleet": figures,
    }


async def through_sluice(runner: SingleTurn, jobs: Sequence[EpisodeRequest], number: int) -> tuple[int, float]:
    """Sampled tokens and seconds."""
    named = [replace(job, id=f"{job.id}.{number}") for job in jobs]
    begin = time.monotonic()
    episodes = await asyncio.gather(*(runner.run(job) for job in named))
    seconds = time.monotonic() - begin
    return sum(episode.num_sampled_tokens for episode in episodes), seconds


def body(ids: Ids, sampling: SamplingParams) -> dict[str, Any]:
    """The request that a client of SGLang would send for the same answer."""
    drawn = {"temperature": sampling.temperature, "max_new_tokens": sampling.max_new_tokens}
    drawn["stop_token_ids"] = list(sampling.stop_token_ids)
    return {"input_ids": ids.tolist(), "sampling_params": drawn, "return_logprob": True}


async def direct_httpx(url: str, ids: Sequence[Ids], sampling: SamplingParams) -> tuple[int, float]:
    """Sampled tokens and seconds, all requests at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(each: Ids) -> int:
            answer = (await client.post("/generate", json=body(each, sampling))).raise_for_status().json()
            return len(answer["meta_info"]["output_token_logprobs"])

        begin = time.monotonic()
        counts = await asyncio.gather(*(one(each) for each in ids))
        return sum(counts), time.monotonic() - begin


async def direct_aiohttp(url: str, ids: Sequence[Ids], sampling: SamplingParams) -> tuple[int, float]:
    """The same with a faster client."""
    import aiohttp

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:

        async def one(each: Ids) -> int:
            async with client.post(f"{url.rstrip('/')}/generate", json=body(each, sampling)) as response:
                response.raise_for_status()
                answer = await response.json()
            return len(answer["meta_info"]["output_token_logprobs"])

        begin = time.monotonic()
        counts = await asyncio.gather(*(one(each) for each in ids))
        return sum(counts), time.monotonic() - begin


# ── prefill and decode apart ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Measured:
    """One turn of the trace."""

    ids: tuple[int, ...]
    first: float
    seconds: float


def pd(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both layouts, one after the other."""
    layouts: dict[str, tuple[str, ...]] = {"regular": ("regular",), "prefill+decode": ("prefill", "decode")}
    found: dict[str, Any] = {}
    answers: dict[str, list[tuple[int, ...]]] = {}
    singles: dict[str, list[tuple[int, ...]]] = {}
    for name, roles in layouts.items():
        config = recipe(arguments)
        common = config.rollout.sglang.groups[0].model_dump(mode="json")
        args = common["args"] if arguments.cpu_smoke else {**common["args"], "max-total-tokens": KEPT_ARGS}
        devices = arguments.devices or [""] * len(roles)
        groups = [
            {**common, "role": role, "args": args, "devices": [each] if each else []}
            for role, each in zip(roles, devices, strict=False)
        ]
        sglang: dict[str, Any] = {"groups": groups, "transfer_backend": arguments.transfer}
        if not arguments.cpu_smoke:
            sglang["memory_fraction"] = 0.8
        changes = {
            "name": f"pd-{name.replace('+', '-')}",
            "rollout": {"sglang": sglang, "router": {"use": "always"}, "context_length": arguments.context},
        }
        begin = time.monotonic()
        found[name], singles[name], answers[name] = asyncio.run(layout(recipe(arguments, changes), arguments))
        found[name]["seconds_with_start"] = round(time.monotonic() - begin, 1)
    one, two = layouts
    return {
        "trace": {key: getattr(arguments, key) for key in ("conversations", "turns", "words", "answer")},
        "layouts": found,
        "single_requests_with_equal_greedy_tokens": share(singles[one], singles[two]),
        "trace_turns_with_equal_greedy_tokens": share(answers[one], answers[two]),
    }


def share(one: Sequence[tuple[int, ...]], two: Sequence[tuple[int, ...]]) -> str:
    return f"{sum(a == b for a, b in zip(one, two, strict=True))} of {len(one)}"


async def layout(
    config: RunConfig, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Start, single requests, a warm-up of the trace, the trace."""
    begin = time.monotonic()
    async with served(config) as rig:
        started = time.monotonic() - begin
        vocabulary = rig.vocabulary
        draw = np.random.default_rng(7)
        lengths = np.linspace(16, arguments.words, 16).astype(int)
        singles = [
            await turn(rig, f"s.{n}", draw.integers(10, vocabulary, size, dtype=np.int32), arguments.answer)
            for n, size in enumerate(lengths)
        ]
        await trace(rig, arguments, seed=1, conversations=max(2, arguments.conversations // 8))
        begin = time.monotonic()
        turns = await trace(rig, arguments, seed=2, conversations=arguments.conversations)
        seconds = time.monotonic() - begin
    context = arguments.words * arguments.turns * (arguments.turns + 1) // 2 * arguments.conversations
    figures = {
        "engine": rig.engine_version,
        "start_seconds": round(started, 1),
        "answer_tokens_per_second": round(sum(len(each.ids) for each in turns) / seconds, 1),
        "context_tokens_per_second": round(context / seconds, 1),
        "first_token_ms": spread([each.first for each in turns], 1e3, 1),
        "turn_ms": spread([each.seconds for each in turns], 1e3, 1),
        "single_first_token_ms": spread([each.first for each in singles], 1e3, 1),
        "seconds": round(seconds, 2),
    }
    return figures, [each.ids for each in singles], [each.ids for each in turns]


async def trace(rig: Served, arguments: argparse.Namespace, *, seed: int, conversations: int) -> list[Measured]:
    """Conversations at once, each turn after the one before, with `words` further tokens of context.

    The context is drawn beforehand and holds none of the answers, so that it is the same in every layout.
    """
    vocabulary = rig.vocabulary

    async def conversation(number: int) -> list[Measured]:
        draw = np.random.default_rng((seed, number))
        ids = np.empty(0, np.int32)
        found: list[Measured] = []
        for at in range(arguments.turns):
            ids = np.concatenate([ids, draw.integers(10, vocabulary, arguments.words, dtype=np.int32)])
            found.append(await turn(rig, f"t.{seed}.{number}", ids, arguments.answer, at))
        return found

    found = await asyncio.gather(*(conversation(number) for number in range(conversations)))
    return [each for conversation in found for each in conversation]


async def turn(rig: Served, key: str, ids: Ids, tokens: int, at: int = 0) -> Measured:
    """One greedy answer, and when its first token came."""
    begin = time.monotonic()
    first: list[float] = []

    def told(_ids: Sequence[int]) -> None:
        if not first:
            first.append(time.monotonic() - begin)

    sampling = SamplingParams(temperature=0.0, max_new_tokens=tokens)
    request = GenerateRequest(f"{key}.{at}", ids, sampling, routing_key=key, on_tokens=told)
    generation = await rig.fleet.generate(request)
    return Measured(tuple(generation.ids.tolist()), first[0], time.monotonic() - begin)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────


def recipe(arguments: argparse.Namespace, changes: dict[str, Any] | None = None) -> RunConfig:
    """The recipe with the command line's overrides, or its stand-in for a smoke test, with `changes` over it."""
    changes = merge({"runs_dir": str(arguments.runs)}, changes or {})
    if arguments.cpu_smoke:
        smoke: dict[str, Any] = {
            "rollout": {
                "engine": "sglang",
                "sglang": {"build": "cpu", "groups": [{"args": {"max-total-tokens": 4096}}]},
            },
            "model": {"scratch": {"architecture": {"max_position_embeddings": 512}}},
            "steps": 2,
        }
        return tiny(arguments.runs / "questions", **merge(smoke, changes))
    config = sized(
        load_recipe(arguments.recipe, arguments.set), train=arguments.train_gpus, rollout=arguments.rollout_gpus
    )
    return RunConfig.model_validate(merge(config.model_dump(mode="json", exclude_unset=True), changes))


COMMANDS = {"train": train, "rollout": rollout, "pd": pd}


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("command", choices=tuple(COMMANDS))
    arguments_of.add_argument("set", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")
    arguments_of.add_argument("--recipe", default="recipes/smollm2.py")
    arguments_of.add_argument("--out", type=Path, help="folder for JSON and PNG")
    arguments_of.add_argument("--runs", type=Path, default=Path("runs/benchmarks"), help="run folders, and logs")
    arguments_of.add_argument("--show", action="store_true", help="show the run's progress")
    arguments_of.add_argument("--cpu-smoke", action="store_true")
    arguments_of.add_argument("--train-gpus", type=int, help="as of `sluice train`")
    arguments_of.add_argument("--rollout-gpus", type=int, help="as of `sluice train`")
    arguments_of.add_argument("--prompts", type=int, default=64)
    arguments_of.add_argument("--samples", type=int, default=8)
    arguments_of.add_argument("--rounds", type=int, default=3)
    arguments_of.add_argument("--client", choices=("httpx", "aiohttp"), default="httpx", help="the direct client")
    arguments_of.add_argument("--conversations", type=int, default=32)
    arguments_of.add_argument("--turns", type=int, default=4)
    arguments_of.add_argument("--words", type=int, default=1_400, help="context tokens that a turn adds")
    arguments_of.add_argument("--answer", type=int, default=64, help="tokens of an answer at most")
    arguments_of.add_argument("--context", type=int, default=8_192)
    arguments_of.add_argument("--transfer", default="nixl", help="KV from prefill to decode")
    arguments_of.add_argument("--devices", nargs=2, help="a GPU for the prefill and one for the decode engine")
    arguments = arguments_of.parse_intermixed_args()
    shutil.rmtree(arguments.runs, ignore_errors=True)
    found = COMMANDS[arguments.command](arguments)
    result = {"command": command_line("gpu_sglang"), **machine(), **found}
    name = found.get("run", f"sglang-{arguments.command}")
    report(result, arguments.out / f"{name}.json" if arguments.out else None)


if __name__ == "__main__":
    main()
