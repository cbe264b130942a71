"""Memory of a Megatron trainer on the CPU: what the ledger counts before a run, beside what its ranks hold.

    python -m benchmarks.megatron_memory [--shape 30m] [--tokens 64] [--out FILE]

For one rank and for two in each way, in float32: the ranks begin on a tiny model and take two steps; what they hold at
most then is libraries and buffers. Others do the same with the shape: `measured` is the difference, over all ranks, and
`counted` what `orchestrate.holdings` says of weights, gradients and moments of all ranks, without activations, which
are few in a batch of `--tokens` tokens. Building and loading are part of the peak. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from benchmarks.rig import command_line, machine, report
from benchmarks.shapes import write_model
from tests.unit.train_cases import make_samples, ratio_loss

from sluice.config.train import TrainConfig
from sluice.orchestrate.holdings import GENERATES, TRAINS, megatron_holdings
from sluice.train.packing import make_batch
from sluice.train.ranks.crew import ProcessCrew
from sluice.train.ranks.trainer import RankedTrainer
from sluice.types import Normaliser

LAYOUTS: tuple[tuple[int, dict[str, Any]], ...] = ((1, {}), (2, {"tp": 2}), (2, {"pp": 2}), (2, {}))


def train(config: TrainConfig, model: Path, folder: Path, tokens: int) -> int:
    """Two steps by ranks of their own; bytes that all of them held at most."""
    crew = ProcessCrew(config.ranks, folder / "ranks", [{"OMP_NUM_THREADS": "1"}] * config.ranks)
    trainer = RankedTrainer(
        crew, config, model, total_steps=4, seed=0, devices=["cpu"] * config.ranks, scratch=folder / "scratch",
        threads=1,
    )  # fmt: skip
    with closing(trainer):
        for seed in range(2):
            samples = make_samples([tokens // 4] * 4, seed=seed)
            trainer.step(make_batch(samples, budget=tokens, normaliser=Normaliser.TOKEN), ratio_loss)
        return sum(trainer.peak_memory())


def row(ranks: int, layout: dict[str, Any], models: dict[str, Path], folder: Path, tokens: int) -> dict[str, Any]:
    given = {"backend": "megatron", "ranks": ranks, "megatron": layout, "micro_batch_tokens": tokens}
    config = TrainConfig.model_validate(given)
    held = {name: train(config, model, folder / name, tokens) for name, model in models.items()}
    stages = frozenset({GENERATES, TRAINS})
    counted = {
        name: sum(entry.size for entry in megatron_holdings(config, model, 0, "cpu", stages).entries)
        for name, model in models.items()
    }
    measured, said = held["shape"] - held["tiny"], counted["shape"] - counted["tiny"]
    return {
        "ranks": ranks, "layout": layout, "counted": said, "measured": measured, "ratio": round(measured / said, 3),
        "tiny_model_bytes": held["tiny"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="30m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"tiny": folder / "tiny-model", "shape": folder / "shape-model"}
        write_model("tiny", models["tiny"])
        write_model(args.shape, models["shape"])
        rows = [
            row(ranks, layout, models, folder / str(number), args.tokens)
            for number, (ranks, layout) in enumerate(LAYOUTS)
        ]
    report({"command": command_line("megatron_memory"), "shape": args.shape, "rows": rows, **machine()}, args.out)


if __name__ == "__main__":
    main()
