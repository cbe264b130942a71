"""Training steps of a tiny model on real megatron-core, with the CPU shim and with each part of it left out.

    python -m tests.integration.shim_program MODEL FOLDER

What each rank saw is a line of `FOLDER/seen.jsonl`: its case, the part left out, gradient norms, and calls that torch
keeps until there is CUDA; or how it failed. Imports are made once: processes part afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tests.integration.megatron_rig import settings
from tests.integration.test_ranks import batch
from tests.unit.train_cases import ratio_loss

from sluice.train.backends.megatron import shim
from sluice.train.backends.megatron.worker import MegatronWorker
from sluice.train.packing import split_over
from sluice.train.ranks.spec import RankSpec
from sluice.train.totals import StepTotals

STEPS = 2
CASES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "recompute": {"activation_checkpointing": True},
    "pipeline": {"ranks": 2, "pp": 2},
}
"""Cheapest first; the model's head is its embedding, which the ends of a pipeline share."""

NEEDED: dict[str, tuple[shim.Part, ...]] = {
    "one rank": (
        shim.Part.CURRENT_DEVICE, shim.Part.RANDOM_STATE, shim.Part.LITERAL, shim.Part.TYPE,
    ),
    "recompute": (shim.Part.STATE_BEFORE, shim.Part.STATE_AFTER),
    "pipeline": (shim.Part.SYNCHRONIZE, shim.Part.MOVE),
}  # fmt: skip
"""Which case cannot do without a part."""


def run_rank(spec: RankSpec, without: str) -> dict[str, Any]:
    shim.install(without=[shim.Part(without)] if without else [])
    worker = MegatronWorker(spec)
    share = split_over(batch(), 1, spec.config.micro_batch_tokens)[0]
    streams = StepTotals(batch()).streams
    norms = [worker.step(share, ratio_loss, streams).grad_norm for _ in range(STEPS)]
    return {"norms": norms, "kept": len(torch.cuda._queued_calls)}  # pyright: ignore


def start_rank(case: str, spec: RankSpec, without: str, folder: Path) -> int:
    if process := os.fork():
        return process
    try:
        found = run_rank(spec, without)
    except BaseException as error:  # noqa: BLE001  (told to the test)
        found = {"failure": f"{type(error).__name__}: {error}"}
    with (folder / "seen.jsonl").open("a") as seen:
        seen.write(json.dumps({"case": case, "without": without, "rank": spec.rank, **found}) + "\n")
    os._exit(0)


def run(case: str, model: Path, folder: Path, without: str) -> None:
    layout = dict(CASES[case])
    ranks, again = layout.pop("ranks", 1), layout.pop("activation_checkpointing", False)
    config = settings(ranks, layout, rank_seconds=20, activation_checkpointing=again)
    meeting = str(folder / f"{case}-{without or 'all'}".replace(" ", "-"))
    specs = [RankSpec(rank, ranks, meeting, config, model, 10, 0, "cpu", {}, (), 1) for rank in range(ranks)]
    for process in [start_rank(case, spec, without, folder) for spec in specs]:
        os.waitpid(process, 0)


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    import_module("sluice.train.backends.megatron.trainer")  # megatron-core with it
    for case, needed in NEEDED.items():
        for without in ("", *needed):
            run(case, model, folder, without)


if __name__ == "__main__":
    main()
