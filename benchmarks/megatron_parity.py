"""Megatron on accelerators against the torch backend in float32, kernel by kernel and layout by layout.

    python -m benchmarks.megatron_parity [--device cuda] [--shape 30m] [--lengths 5000 4096 300 2 …] [--ranks 1 2]
                                         [--only TEXT …] [--jobs 4] [--out FILE]
    python -m benchmarks.megatron_parity --device cpu --shape tiny --lengths 33 9 2

Every case is a trainer in processes of its own. It reads a folder of bfloat16 weights and gives them back (`exact`: bit
for bit), scores samples, computes a gradient, leaves the accelerator and comes back (`returned`: bit for bit; `left`:
its bytes meanwhile), and makes three updates. Compared with one float32 process of the torch backend: log-probs, by
their mean and largest difference in nats; the gradient, by the norm of the difference over the norm; loss and norm of
the three updates, by their largest relative difference. The torch backend in bfloat16 is a case as well: what rounding
alone does. Prints one JSON object; ends with 1 where a case failed.
"""

from __future__ import annotations

import argparse
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from benchmarks.rig import command_line, machine, parser, report, say
from benchmarks.shapes import SHAPES, write_model
from benchmarks.step_watch import policy_loss
from benchmarks.training_step import samples
from safetensors.torch import load_file

from sluice import device
from sluice.config.train import TrainConfig
from sluice.errors import SluiceError
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.train.ranks.crew import ProcessCrew
from sluice.train.ranks.trainer import RankedTrainer
from sluice.types import Normaliser, TrainSample

UPDATES = 3
_HERE = Lock()  # transformers cannot build two models at a time in one process
BFLOAT16 = {"dtype": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Case:
    """A trainer: its ranks, what it changes of the training configuration, and of Megatron's part of it."""

    name: str
    ranks: int = 1
    train: Mapping[str, Any] = field(default_factory=dict)
    megatron: Mapping[str, Any] | None = field(default_factory=dict)

    def config(self, budget: int) -> TrainConfig:
        """Updates small enough that bfloat16 weights differ in their last bit."""
        own = {"backend": "torch"} if self.megatron is None else {"backend": "megatron", "megatron": self.megatron}
        return TrainConfig.model_validate(
            {
                "ranks": self.ranks, "micro_batch_tokens": budget, "logprob_chunk": 1_024, "share_prompts": "never",
                "rank_seconds": 300, "optimizer": {"lr": 1e-4, "eps": 1e-4}, **own, **self.train,
            }
        )  # fmt: skip


def recomputing(name: str, **megatron: Any) -> Case:
    return Case(f"recompute {name}", train={**BFLOAT16, "activation_checkpointing": True}, megatron=megatron)


CASES = (
    Case("torch float32", megatron=None),
    Case("torch bfloat16", train=BFLOAT16, megatron=None),
    Case("float32"),
    Case("float32, not compiled", train={"compile": False}),
    Case("bfloat16", train=BFLOAT16),
    Case("not compiled", train={**BFLOAT16, "compile": False}),
    *(
        Case(f"attention {kernel}", train=BFLOAT16, megatron={"attention": kernel})
        for kernel in ("cudnn", "flash", "varlen")
    ),
    *(recomputing(kind, recompute=kind) for kind in ("layers", "mlp", "attention")),
    recomputing("one layer", recompute_layers=1),
    Case("gradients bfloat16", train=BFLOAT16, megatron={"gradients": "bfloat16"}),
    Case("whole optimizer", train=BFLOAT16, megatron={"distributed_optimizer": False, "overlap": False}),
    Case("optimizer on the host", train=BFLOAT16, megatron={"offload_optimizer": 1.0}),
    Case("half of the optimizer on the host", train=BFLOAT16, megatron={"offload_optimizer": 0.5}),
    Case("torch, 2 replicas", 2, BFLOAT16, None),
    Case("2 replicas", 2, BFLOAT16),
    Case("2 replicas, whole optimizers", 2, BFLOAT16, {"distributed_optimizer": False, "overlap": False}),
    Case("2 replicas, optimizer on the host", 2, BFLOAT16, {"offload_optimizer": 1.0}),
    Case("tp 2", 2, BFLOAT16, {"tp": 2}),
    Case("tp 2, no sequence parallelism", 2, BFLOAT16, {"tp": 2, "sequence_parallel": False}),
    Case("pp 2", 2, BFLOAT16, {"pp": 2}),
    Case("pp 2, vpp 2", 2, BFLOAT16, {"pp": 2, "vpp": 2}),
    Case("cp 2", 2, BFLOAT16, {"cp": 2}),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a trainer computed."""

    logprobs: np.ndarray
    gradients: Mapping[str, torch.Tensor]
    figures: Sequence[tuple[float, float]]
    facts: Mapping[str, Any]


def run(trainer: Any, config: TrainConfig, drawn: Sequence[TrainSample], model: Path) -> Measured:
    """Read, score, differentiate, leave and return, update."""
    there, back = load_file(model / "model.safetensors"), dict(trainer.named_weights())
    facts: dict[str, Any] = {
        "exact": there.keys() == back.keys() and all(torch.equal(back[name].cpu(), there[name]) for name in there)
    }
    scored = trainer.score(drawn, frozenset({"proximal"}))
    batch = make_batch(scored, budget=config.micro_batch_tokens, normaliser=Normaliser.TOKEN)
    gradients = {name: tensor.cpu().float() for name, tensor in trainer.gradients(batch, policy_loss).items()}
    trainer.offload()
    facts["left"] = trainer.replicas.all("memory") if isinstance(trainer, RankedTrainer) else None
    trainer.onload()
    facts["returned"] = all(torch.equal(tensor, back[name]) for name, tensor in trainer.named_weights())
    figures: list[tuple[float, float]] = []
    for _ in range(UPDATES):
        stats = trainer.step(batch, policy_loss)
        figures.append((stats.loss, stats.grad_norm))
    logprobs = np.concatenate([sample["proximal"][1:] for sample in scored])
    return Measured(logprobs, gradients, figures, facts)


def measured(case: Case, args: argparse.Namespace, places: Sequence[str], model: Path, work: Path) -> Measured:
    """`case` in processes of its own, or torch in this one where it has one rank."""
    drawn = samples(args.lengths, SHAPES[args.shape].vocab_size)
    config = case.config(max(sum(args.lengths) // 2, *args.lengths))
    options: dict[str, Any] = {"total_steps": 100, "seed": 0}
    if config.backend == "torch" and case.ranks == 1:
        with _HERE:
            return run(TorchTrainer(config, model, device=places[0], **options), config, drawn, model)
    crew = ProcessCrew(case.ranks, work / "logs", [{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}] * case.ranks)
    worker = ("benchmarks.step_watch", "WatchedTorch" if config.backend == "torch" else "WatchedMegatron")
    trainer = RankedTrainer(
        crew, config, model, devices=places, scratch=work / "scratch", threads=1, worker=worker, **options
    )
    with closing(trainer):
        return run(trainer, config, drawn, model)


def compared(found: Measured, wanted: Measured) -> dict[str, Any]:
    apart = np.abs(found.logprobs - wanted.logprobs)
    norm = sum(float(each.square().sum()) for each in wanted.gradients.values()) ** 0.5
    off = sum(float((found.gradients[name] - each).square().sum()) for name, each in wanted.gradients.items()) ** 0.5
    pairs = list(zip(found.figures, wanted.figures, strict=True))
    return {
        **found.facts,
        "logprob_mean": float(apart.mean()),
        "logprob_max": float(apart.max()),
        "gradient": off / norm,
        "loss": max(abs(ours[0] - theirs[0]) for ours, theirs in pairs),
        "norm": max(abs(ours[1] / theirs[1] - 1) for ours, theirs in pairs),
    }


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of every chosen case, `args.jobs` of them at a time."""
    first = device.resolve(args.device)
    there = torch.cuda.device_count() if first != "cpu" else max(args.ranks)
    torch.set_num_threads(1 if first == "cpu" else torch.get_num_threads())
    chosen = [case for case in CASES if case.ranks in args.ranks]
    if args.only:
        chosen = [case for case in chosen if any(text in case.name for text in args.only)]
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        write_model(args.shape, model)
        wanted = measured(CASES[0], args, [first], model, Path(name))

        def row(number: int, case: Case) -> dict[str, Any]:
            if first != "cpu" and case.ranks > there:
                return {"case": case.name, "ranks": case.ranks, "not_run": f"needs {case.ranks} GPUs"}
            alone = [f"cuda:{number % there}"] if first != "cpu" else [first]
            places = alone if case.ranks == 1 else device.several(first, case.ranks)
            say(case.name)
            try:
                found = compared(measured(case, args, places, model, Path(name) / str(number)), wanted)
            except (SluiceError, RuntimeError, AssertionError) as error:
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"}
            return {"case": case.name, "ranks": case.ranks, **found}

        with ThreadPoolExecutor(args.jobs) as pool:
            return list(pool.map(row, range(len(chosen)), chosen))


def main() -> None:
    of = parser(__doc__)
    of.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    of.add_argument("--shape", choices=tuple(SHAPES), default="30m")
    of.add_argument("--lengths", type=int, nargs="+", default=[5_000, 4_096, 4_097, 1_024, 512, 512, 300, 17, 2])
    of.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="cases with so many ranks")
    of.add_argument("--only", nargs="+", help="cases in whose name one of these stands")
    of.add_argument("--jobs", type=int, default=1, help="cases at a time")
    of.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = of.parse_args()
    found = rows(args)
    sizes = {name: getattr(args, name) for name in ("device", "shape", "lengths", "jobs")}
    report({"command": command_line("megatron_parity"), **sizes, "rows": found, **machine()}, args.out)
    if any("failed" in row for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
