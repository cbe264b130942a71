"""One RL training step of a model in a known shape, the torch backend beside Megatron.

    python -m benchmarks.training_step [--device cuda] [--shapes qwen3-4b …] [--packs 1x16384 4x4096 …]
        [--backends torch megatron] [--recompute none layers layers:20 mlp …] [--attention auto] [--compile auto]
        [--gradients float32] [--offload 0] [--ranks 1] [--tp 1] [--pp 1] [--cp 1] [--passes 1] [--steps 3]
        [--profile] [--out FILE]
    python -m benchmarks.training_step --device cpu --shapes tiny 30m --packs 1x1024 8x128 --dtype float32

A step is what a run does with a batch: score it with the current weights (stream `proximal`), forward and backward of a
clipped policy gradient over all tokens but the first of each sample, global norm, clip, AdamW. Weights are random, and
so are tokens. A pack `COUNTxLENGTH` is one micro-batch; every replica of the model makes `--passes` of them in a step.
`64x256~` has samples of 256 tokens on average, of other lengths in every step, as a run has (uniform from half to one
and a half): what is planned or compiled for each length then shows.
Every backend is measured in processes of its own, with the trainer that a run would have; on one GPU all packs of one
pass one after the other, elsewhere each pack with new ones. Figures are medians after two steps that are not counted,
`spread` is (slowest / fastest) - 1 of the counted ones. Prints one JSON object; `--out` has what was measured so far.

Work of a step, in FLOP, for N parameters that multiply every token, T tokens, h heads of d, L layers and samples of s:

    training = 6 N T + Σ 6 s² h d L        scoring = a third of that

Attention is counted causal, an embedding that is not the head not at all, and recomputation neither. `mfu_training` is
that work over the seconds of forward, backward, norm, clip and optimizer; `mfu` is both over the whole step, with what
the controller does. Both are shares of the accelerators' matmul peak, which is measured in the same run.

Seconds by part are those of the slowest rank, which waits for its accelerator before and after each part. On a CPU they
are CPU seconds of each rank, and `whole` is their sum, so that other work on the machine counts little; `wall` is what
the controller waited for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.rig import command_line, machine, parser, report, say
from benchmarks.shapes import SHAPES, parameters, write_model
from benchmarks.step_watch import Watch, policy_loss

from sluice import device
from sluice.config.train import TrainConfig
from sluice.errors import SluiceError
from sluice.train.backends.torch import TorchTrainer
from sluice.train.layout import Layout
from sluice.train.packing import make_batch
from sluice.train.ranks.crew import ProcessCrew
from sluice.train.ranks.trainer import RankedTrainer
from sluice.types import STREAMS, Normaliser, TrainSample, Version

WORKERS = {
    "torch": ("benchmarks.step_watch", "WatchedTorch"),
    "megatron": ("benchmarks.step_watch", "WatchedMegatron"),
}
FORMULA = "training = 6 N T + sum of 6 s^2 h d L (causal attention); scoring = a third of it; no recomputation"
WARM_UP = 2
Call = Callable[[str], list[Any]]
"""Calls a method of `Watch` at every rank."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Samples of one micro-batch: how many, of how many tokens, and whether that is a mean."""

    count: int
    length: int
    varies: bool

    @classmethod
    def of(cls, text: str) -> Pack:
        """From `4x4096` or `64x256~`."""
        count, length = text.rstrip("~").split("x")
        return cls(int(count), int(length), text.endswith("~"))

    def __str__(self) -> str:
        return f"{self.count}x{self.length}{'~' * self.varies}"

    @property
    def tokens(self) -> int:
        return self.count * self.length

    def lengths(self, packs: int, step: int) -> list[int]:
        """Of the samples of a step that has so many packs; together always the same number of tokens."""
        if not self.varies:
            return [self.length] * self.count * packs
        rng = np.random.default_rng(step)
        drawn = rng.uniform(0.5, 1.5, (packs, self.count))
        ends = np.round(np.cumsum(drawn, axis=1) / drawn.sum(axis=1, keepdims=True) * self.tokens).astype(int)
        return np.diff(ends, axis=1, prepend=0).reshape(-1).tolist()


def budget_of(pack: Pack) -> int:
    """Tokens of a pass: some more than a pack where samples of other lengths must be shared out into passes."""
    return pack.tokens + pack.length * pack.varies


def settings(args: argparse.Namespace, backend: str, recompute: str, budget: int) -> TrainConfig:
    """The trainer of a row.

    Raises:
        ValueError: the backend has no such setting.
    """
    kind, _, layers = recompute.partition(":")
    common: dict[str, Any] = {
        "backend": backend, "ranks": args.ranks, "micro_batch_tokens": budget, "dtype": args.dtype,
        "activation_checkpointing": kind != "none", "logprob_chunk": args.logprob_chunk, "share_prompts": "never",
        "rank_seconds": 900, "optimizer": {"lr": 1e-6},
        "compile": {"auto": None, "on": True, "off": False}[args.compile],
    }  # fmt: skip
    if backend == "torch":
        if recompute not in ("none", "layers"):
            raise ValueError("torch recomputes all layers or none")
        return TrainConfig.model_validate(common)
    megatron: dict[str, Any] = {
        name: getattr(args, name) for name in ("tp", "pp", "vpp", "cp", "attention", "gradients")
    }
    megatron["offload_optimizer"] = args.offload
    if kind != "none":
        megatron |= {"recompute": kind, "recompute_layers": int(layers) if layers else None}
    return TrainConfig.model_validate({**common, "megatron": megatron})


def samples(lengths: Sequence[int], vocabulary: int) -> list[TrainSample]:
    """Random tokens, all of them sampled and trained but the first of each, with an advantage of +1 and -1 in turns."""
    rng = np.random.default_rng(0)
    made: list[TrainSample] = []
    for number, length in enumerate(lengths):
        streams = {name: np.full(length, fill, dtype=dtype) for name, (dtype, fill) in STREAMS.items()}
        for name in ("proximal", "reference", "value"):
            del streams[name]
        streams["weight"][1:] = 1.0
        streams["version"][1:] = Version(0).code
        streams["behaviour"][1:] = -np.log(vocabulary)
        streams["advantage"][1:] = 1.0 - 2.0 * (number % 2)
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        made.append(TrainSample(f"e{number}", f"g{number}", 0, ids, streams))
    return made


def work(shape: str, lengths: Sequence[int]) -> float:
    """FLOP of training on samples of these lengths; see the module."""
    config = SHAPES[shape]
    attention = 6 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 6 * parameters(shape)[1] * sum(lengths) + attention * sum(length**2 for length in lengths)


def measure(args: argparse.Namespace) -> None:
    """Rows of all packs, in this process and the ranks that it starts, each printed as a line of JSON once it is known.

    After a pack that does not fit nothing more is measured: what its failure left behind is in the way.
    """
    backend, shape, recompute = args.backends[0], args.shapes[0], args.recompute[0]
    torch.set_num_threads(args.threads)
    config = settings(args, backend, recompute, max(budget_of(pack) for pack in args.packs))
    places = device.several(device.resolve(args.device), config.ranks)
    with tempfile.TemporaryDirectory() as name:
        opened = opened_torch if backend == "torch" and config.ranks == 1 else opened_ranks
        try:
            begin = time.perf_counter()
            trainer, context, call = opened(config, args, places, Path(name))
            sizes = {"parameters": parameters(shape)[0], "load_seconds": round(time.perf_counter() - begin, 1)}
            with context:
                for pack in args.packs:
                    call("reset_peak")
                    found = measure_pack(pack, trainer, call, config, args)
                    print(json.dumps({**found, **sizes}), flush=True)
        except (torch.OutOfMemoryError, SluiceError) as error:
            if "out of memory" not in str(error).lower():
                raise
            print(json.dumps({"does_not_fit": str(error).splitlines()[0].partition(". GPU ")[0]}), flush=True)


def measure_pack(pack: Pack, trainer: Any, call: Call, config: TrainConfig, args: argparse.Namespace) -> dict[str, Any]:
    """A row: steps on one kind of pack."""
    packs = args.passes * Layout.of(config, ranks=config.ranks).replicas
    vocabulary = SHAPES[args.shapes[0]].vocab_size
    drawn = lambda number: samples(pack.lengths(packs, number), vocabulary)  # noqa: E731
    steps = [one_step(trainer, drawn(number), config, call) for number in range(WARM_UP + args.steps)]
    found = {**summary(steps, args, args.shapes[0]), "peak_bytes": trainer.peak_memory()}
    if args.profile:
        call("profile")
        one_step(trainer, drawn(len(steps)), config, call)
        found["profile"] = call("profiled")[0]
    return found


def opened_torch(
    config: TrainConfig, args: argparse.Namespace, places: Sequence[str], work: Path
) -> tuple[Any, AbstractContextManager[Any], Call]:
    """The torch trainer of one process, which is this one."""
    trainer: Any = TorchTrainer(config, args.model, total_steps=100, seed=0, device=places[0])
    watch = Watch(places[0])
    watch.on(trainer.optimizer)
    trainer.score, trainer.step = watch.around("score", trainer.score), watch.around("step", trainer.step)
    return trainer, nullcontext(), lambda method: [getattr(watch, method)()]


def opened_ranks(
    config: TrainConfig, args: argparse.Namespace, places: Sequence[str], work: Path
) -> tuple[Any, AbstractContextManager[Any], Call]:
    """Ranks, of either backend."""
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    crew = ProcessCrew(config.ranks, work / "logs", [environment] * config.ranks)
    trainer = RankedTrainer(
        crew, config, args.model, total_steps=100, seed=0, devices=places, scratch=work / "scratch",
        threads=args.threads, worker=WORKERS[config.backend],
    )  # fmt: skip
    return trainer, closing(trainer), lambda method: crew.call(method, [()] * crew.size, seconds=300)


def one_step(trainer: Any, drawn: Sequence[TrainSample], config: TrainConfig, call: Call) -> dict[str, Any]:
    """Score and train; seconds by part, loss and norm."""
    begin = time.perf_counter()
    scored = trainer.score(drawn, frozenset({"proximal"}))
    batch = make_batch(scored, budget=config.micro_batch_tokens, normaliser=Normaliser.TOKEN)
    stats = trainer.step(batch, policy_loss)
    wall = time.perf_counter() - begin
    ranks = call("take")
    parts = {name: max(each[name] for each in ranks) for name in ("score", "forward_backward", "grad_norm", "update")}
    return {**parts, "wall": wall, "loss": stats.loss, "norm": stats.grad_norm, "passes": stats.num_micro_batches,
            "tokens": stats.num_tokens, "lengths": [len(sample) for sample in drawn]}  # fmt: skip


def summary(steps: Sequence[dict[str, Any]], args: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Figures of a row."""
    counted = steps[WARM_UP:]
    seconds = {
        name: statistics.median(step[name] for step in counted)
        for name in ("score", "forward_backward", "grad_norm", "update", "wall")
    }
    training = sum(seconds[name] for name in ("forward_backward", "grad_norm", "update"))
    seconds["whole"] = training + seconds["score"] if args.device == "cpu" else seconds["wall"]
    seconds["controller"] = seconds["wall"] - training - seconds["score"]
    if args.device == "cpu":
        del seconds["controller"]  # the others are CPU seconds
    timed = ("score", "forward_backward", "grad_norm", "update") if args.device == "cpu" else ("wall",)
    wholes = [sum(step[name] for name in timed) for step in counted]
    tokens = counted[0]["tokens"]
    flop, peak = statistics.median(work(shape, step["lengths"]) for step in counted), args.peak * args.ranks
    return {
        "tokens": tokens, "passes": counted[0]["passes"],
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "spread": round(max(wholes) / min(wholes) - 1, 3),
        "tokens_per_second": round(tokens / seconds["whole"], 1),
        "trained_tokens_per_second": round(tokens / training, 1),
        "mfu": round(flop * 4 / 3 / seconds["whole"] / peak, 4),
        "mfu_training": round(flop / training / peak, 4),
        "first_step": {"loss": steps[0]["loss"], "grad_norm": steps[0]["norm"]},
    }  # fmt: skip


def matmul_peak(args: argparse.Namespace) -> float:
    """FLOP/s of a large square matrix product: the median of several."""
    torch.set_num_threads(args.threads)
    size = 1_024 if args.device == "cpu" else 8_192
    on = device.resolve(args.device)
    left, right = (torch.randn(size, size, device=on, dtype=getattr(torch, args.dtype)) for _ in range(2))
    watch = Watch(on)
    times: list[float] = []
    for _ in range(30):
        with watch.over("product"):
            torch.mm(left, right)
        times.append(watch.take()["product"])
    return 2 * size**3 / statistics.median(times[10:])


def child(args: argparse.Namespace, *flags: str) -> subprocess.Popen[str]:
    """A process of its own with these flags after those of this one."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    command = [sys.executable, "-m", "benchmarks.training_step", *sys.argv[1:], *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def alone(args: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """What a child that must not fail finds."""
    with child(args, *flags) as process:
        said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(said.splitlines()[-1])


def several(args: argparse.Namespace, packs: Sequence[Pack], *flags: str) -> Iterator[tuple[Pack, dict[str, Any]]]:
    """Rows of packs by children, each of which measures as many as it can, on a CPU, where peaks last, one."""
    left = list(packs)
    whole = args.device == "cuda" and args.passes == 1 and args.ranks == 1 and not any(pack.varies for pack in packs)
    while left:
        chosen = left if whole else left[:1]
        with child(args, "--part", "row", *flags, "--packs", *map(str, chosen)) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield left.pop(0), json.loads(line)
        if process.returncode:
            yield left.pop(0), {"failed": f"exit code {process.returncode}; its output is above"}


def in_process(args: argparse.Namespace) -> None:
    """What `child` asks for."""
    if args.part == "peak":
        print(json.dumps({"flops": matmul_peak(args)}))
    elif args.part == "model":
        write_model(args.shapes[0], args.model)
        print("{}")
    else:
        measure(args)


def rows(args: argparse.Namespace) -> dict[str, Any]:
    """All of them, written as they come."""
    available = torch.cuda.device_count() if args.device == "cuda" else args.ranks
    sizes = (
        "device", "dtype", "ranks", "tp", "pp", "vpp", "cp", "passes", "steps", "attention", "compile", "gradients",
        "offload", "logprob_chunk", "threads",
    )  # fmt: skip
    result: dict[str, Any] = {
        "command": command_line("training_step"), **{name: getattr(args, name) for name in sizes}, "work": FORMULA,
    }  # fmt: skip
    if available < args.ranks:
        needed = "a GPU" if args.ranks == 1 else f"{args.ranks} GPUs"
        return {**result, "rows": f"needs {needed}, not run", **machine()}
    result["matmul_peak"] = alone(args, "--part", "peak")["flops"]
    result |= {"rows": [], **machine()}
    with tempfile.TemporaryDirectory() as name:
        for shape in args.shapes:
            model = Path(name) / shape
            alone(args, "--part", "model", "--shapes", shape, "--model", str(model))
            for recompute, backend in itertools.product(args.recompute, args.backends):
                say(f"{shape} {backend} recompute={recompute}")
                row = {"shape": shape, "backend": backend, "recompute": recompute}
                try:
                    settings(args, backend, recompute, 1)
                except ValueError as error:
                    result["rows"].append({**row, "not_run": str(error).splitlines()[-1].strip()})
                    continue
                flags = ("--shapes", shape, "--backends", backend, "--recompute", recompute)
                flags += ("--model", str(model), "--peak", str(result["matmul_peak"]))
                for pack, found in several(args, args.packs, *flags):
                    say(f"  {pack}")
                    result["rows"].append({**row, "pack": str(pack), **found})
                    if args.out:
                        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main() -> None:
    of = parser(__doc__)
    of.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    of.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["qwen3-4b"])
    of.add_argument(
        "--packs",
        nargs="+",
        type=Pack.of,
        default=[Pack.of("1x16384"), Pack.of("4x4096")],
        help="COUNTxLENGTH, COUNTxLENGTH~",
    )
    of.add_argument("--backends", nargs="+", choices=tuple(WORKERS), default=list(WORKERS))
    of.add_argument("--recompute", nargs="+", default=["layers"], help="none, layers, layers:N, mlp, attention")
    of.add_argument("--attention", choices=("auto", "cudnn", "flash", "varlen"), default="auto")
    of.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    of.add_argument("--gradients", choices=("float32", "bfloat16"), default="float32")
    of.add_argument("--offload", type=float, default=0.0, help="share of moments that Megatron keeps in host memory")
    of.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    for name in ("ranks", "tp", "pp", "vpp", "cp"):
        of.add_argument(f"--{name}", type=int, default=1)
    of.add_argument("--passes", type=int, default=1, help="micro-batches of each replica in a step")
    of.add_argument("--steps", type=int, default=3, help="that are counted")
    of.add_argument("--logprob-chunk", type=int, default=2_048)
    of.add_argument("--threads", type=int, default=1, help="of each process")
    of.add_argument("--profile", action="store_true", help="kernels of one more step by kind, at rank 0")
    of.add_argument("--out", type=Path, help="also write the JSON to this file")
    for name, kind in (("part", str), ("model", Path), ("peak", float)):
        of.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = of.parse_args()
    if args.part:
        in_process(args)
        return
    report(rows(args), args.out)


if __name__ == "__main__":
    main()
