"""Seconds a run stands still for a checkpoint: written beside training, against waited for.

    python -m benchmarks.checkpoints [--device cpu|cuda] [--ranks 1] [--rounds 3] [--layers 30] [--hidden 576]
                                     [--intermediate 1536] [--vocabulary 49152] [--samples 2] [--budget 512]
                                     [--dtype float32] [--folder DIR] [--out FILE]

A random Llama, by default in the shape of SmolLM2-135M, in training. In each round the trainer writes one checkpoint
and waits for it, then one that is written while it trains on; both are whole (weights, moments, digests, flushed to
disk), and of one process, so that they can be compared. Prints one JSON object; `load` is that of the machine at the
start, in processes for each core.

`stands_still_seconds` is from asking for a checkpoint to the next step's begin, `write_seconds` what its writing took.
`step_seconds` are of steps with nothing else (`waiting`), and of those that began while a checkpoint was being written
(`background`). `copy_bytes` is what host memory holds for the latter, on top of everything else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.ranks import policy_loss, samples

from sluice import device
from sluice.checkpoint.store import CheckpointStore
from sluice.config.model import ScratchConfig, TokenizerConfig
from sluice.config.train import OptimizerConfig, TrainConfig
from sluice.log.records import CheckpointRecord
from sluice.log.writer import LogWriter
from sluice.models.build import make_scratch
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.saver import Saver, snapshots
from sluice.orchestrate.trainers import Trainers
from sluice.train.base import Trainer
from sluice.train.packing import make_batch
from sluice.types import Normaliser, TrainBatch, Version

KINDS = {"waiting": False, "background": True}


def make_model(args: argparse.Namespace, folder: Path) -> Path:
    """A random Llama in `folder`, its head tied."""
    architecture = {
        "model_type": "llama", "hidden_size": args.hidden, "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers, "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": max(args.hidden // 192, 1), "head_dim": 64, "max_position_embeddings": args.budget,
        "tie_word_embeddings": True,
    }  # fmt: skip
    words = tuple(f"w{number}" for number in range((args.vocabulary - 4) // 2))  # each is there with a space, too
    scratch = ScratchConfig(architecture=architecture, tokenizer=TokenizerConfig(words=words, chat_template=""))
    make_scratch(scratch, folder, seed=0)
    return folder


class Bench:
    """Checkpoints of one trainer, and the steps behind them."""

    def __init__(self, trainer: Trainer, batch: TrainBatch, folder: Path, journal: Journal) -> None:
        self._trainer, self._batch = trainer, batch
        self._store = CheckpointStore(folder / "checkpoints", keep=1)
        self._savers = {
            kind: Saver(self._store, journal, background=background, apart=False) for kind, background in KINDS.items()
        }
        self._number = 0
        self.found: dict[str, dict[str, list[float]]] = {
            kind: {"stands_still_seconds": [], "write_seconds": [], "step_seconds": []} for kind in KINDS
        }

    def step(self) -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        self._trainer.step(self._batch, policy_loss)
        return time.perf_counter() - began

    async def round(self, kind: str) -> None:
        """One checkpoint as the loop makes it, then a step, and further ones while it is being written."""
        saver, found = self._savers[kind], self.found[kind]
        self._number += 1
        began = time.perf_counter()
        await saver.settle()
        write = snapshots(self._trainer, None, copy=saver.background)
        await saver.begin(self._number, {}, write, CheckpointRecord(self._number, Version(self._number)))
        found["stands_still_seconds"].append(time.perf_counter() - began)
        del write  # the copy is the saver's alone
        while True:
            found["step_seconds"].append(self.step())
            await saver.look()
            if figures := saver.figures():
                break
        found["write_seconds"].append(figures["checkpoint/write_seconds"])

    def size(self) -> int:
        """Bytes of the newest checkpoint, which is compared with its manifest."""
        newest = self._store.latest()
        assert newest is not None  # a round was made
        return sum(file.stat().st_size for file in newest.folder.rglob("*") if file.is_file())

    def close(self) -> None:
        for saver in self._savers.values():
            saver.close()


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = TrainConfig(
        optimizer=OptimizerConfig(lr=1e-5), micro_batch_tokens=args.budget, dtype=args.dtype, ranks=args.ranks,
        rank_seconds=300,
    )  # fmt: skip
    batch = make_batch(samples(args), budget=args.budget, normaliser=Normaliser.TOKEN)
    trainers = Trainers(device.resolve(args.device), folder, torch.get_num_threads())
    model = make_model(args, folder / "model")
    with (
        LogWriter(folder / "log") as log,
        trainers.open("policy", config, model, total_steps=1_000, seed=0) as trainer,
    ):
        parameters = sum(tensor.numel() for _, tensor in trainer.named_weights())
        bench = Bench(trainer, batch, folder, Journal(log))
        bench.step()  # moments are there after it
        try:
            for _ in range(args.rounds):
                for kind in KINDS:
                    asyncio.run(bench.round(kind))
            size = bench.size()
        finally:
            bench.close()
    middle = {kind: {name: median(values) for name, values in found.items()} for kind, found in bench.found.items()}
    return {
        "parameters": parameters,
        "batch_tokens": batch.num_tokens,
        "checkpoint_bytes": size,
        "copy_bytes": parameters * (12 if args.dtype == "float32" else 14),
        "median": middle,
        "rounds": bench.found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    shape = {"layers": 30, "hidden": 576, "intermediate": 1536, "vocabulary": 49_152}
    for name, number in ({"ranks": 1, "rounds": 3, "samples": 2, "budget": 512} | shape).items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured; a temporary one without")
    parser.add_argument("--note", help="is added to the result: what else went on")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "folder", "note")},
        "note": args.note,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.cuda.device_count()} accelerators",
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result |= measure(args, Path(folder))
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    from benchmarks import checkpoints

    checkpoints.main()  # by this name, so that ranks can import the loss
