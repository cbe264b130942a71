"""A Megatron rank's checkpoint as whole tensors, beside megatron-core's own dist_checkpointing, on one CPU rank.

    python -m benchmarks.megatron_checkpoints [--layers 4 12] [--hidden 64 768] [--vocabulary 512 16384] [--out FILE]

For each size: a random Llama takes one training step; then weights and optimizer state are saved and loaded in either
way, in one process. `blocks_seconds` is how long training stands still, `save_seconds` until everything is written (not
flushed to disk), `bytes` what lies in the folder. The distributed optimizer is on, float32; dist_checkpointing is
given its `fully_reshardable` form, the one that other layouts can read. Its load needs the optimizer's moments made
first, which is part of its `load_seconds`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.checkpoints import make_model
from benchmarks.rig import command_line, machine, report
from tests.integration.test_ranks import batch
from tests.unit.train_cases import ratio_loss

from sluice.config.train import TrainConfig
from sluice.train.backends.megatron.worker import MegatronWorker
from sluice.train.packing import split_over
from sluice.train.ranks.spec import RankSpec
from sluice.train.totals import StepTotals


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 3)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def begin(model: Path, meeting: Path) -> MegatronWorker:
    """A rank after its first step: there are moments."""
    config = TrainConfig.model_validate({"backend": "megatron", "micro_batch_tokens": 64, "optimizer": {"lr": 1e-4}})
    worker = MegatronWorker(RankSpec(0, 1, str(meeting), config, model, 10, 0, "cpu", {}, (), None))
    worker.step(split_over(batch(), 1, 64)[0], ratio_loss, StepTotals(batch()).streams)
    return worker


def whole_tensors(worker: MegatronWorker, folder: Path) -> dict[str, Any]:
    blocks = seconds(lambda: worker.snapshot(True))
    rest = seconds(lambda: (worker.write("model", folder / "model"), worker.write("state", folder / "state")))
    load = seconds(lambda: worker.load_state(folder / "model", folder / "state"))
    return {
        "blocks_seconds": blocks, "save_seconds": round(blocks + rest, 3), "load_seconds": load, "bytes": size(folder),
    }  # fmt: skip


def dist_checkpointing(worker: MegatronWorker, folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing as core
    from megatron.core import parallel_state

    model: Any = worker._trainer.model  # pyright: ignore[reportPrivateUsage]
    chunk, optimizer = model._chunks[0], model.optimizer.core
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }  # fmt: skip

    def described(loading: bool) -> dict[str, Any]:
        weights = chunk.module.sharded_state_dict(metadata=metadata)
        return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, loading, metadata=metadata)}

    def load() -> None:
        for part in model.optimizer.parts:
            part._init_optimizer_states_with_dummy_values()
        found: Any = core.load(described(True), str(folder))
        chunk.module.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    folder.mkdir()
    saved = seconds(lambda: core.save(described(False), str(folder)))
    found: dict[str, Any] = {"blocks_seconds": saved, "save_seconds": saved, "bytes": size(folder)}
    try:
        found["load_seconds"] = seconds(load)
    except Exception as error:  # noqa: BLE001  (it is a result)
        found["load_fails"] = f"{type(error).__name__}: {error}"
    return found


def compare(args: argparse.Namespace, number: int, folder: Path) -> dict[str, Any]:
    shape = argparse.Namespace(
        hidden=args.hidden[number], intermediate=args.hidden[number] * 3, layers=args.layers[number],
        vocabulary=args.vocabulary[number], budget=64,
    )  # fmt: skip
    worker = begin(make_model(shape, folder / "model"), folder / "meeting")
    parameters = sum(part.part.numel() for part in worker._trainer.model.held)  # pyright: ignore[reportPrivateUsage]
    ours, theirs = whole_tensors(worker, folder / "ours"), dist_checkpointing(worker, folder / "theirs")
    return {"parameters": parameters, "whole_tensors": ours, "dist_checkpointing": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 768])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[512, 16_384])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for number in range(len(args.layers)):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(args, number, Path(folder)))
    report({"command": command_line("megatron_checkpoints"), "rows": rows, **machine()}, args.out)


if __name__ == "__main__":
    main()
