"""What every backend's worker does at a rank, and how ranks meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from sluice import device as devices
from sluice.errors import CheckpointError
from sluice.plugins import load_files
from sluice.train.base import Loss, Writer
from sluice.train.ranks.spec import RankSpec
from sluice.train.totals import MicroResult
from sluice.types import MicroBatch, TrainSample


@dataclass(frozen=True, slots=True, eq=False)
class StepPart:
    """A replica's share of an optimizer step, as its speaker tells it (`Layout.speaker`).

    Attributes:
        results: of its passes, on the CPU; None where it had nothing to train.
        grad_norm: of the whole model, the same at every rank.
        lr: rate that was used; 0 when the gradient was not finite and nothing was updated.
    """

    results: tuple[MicroResult | None, ...]
    grad_norm: float
    lr: float


class Worker(Protocol):
    """A rank: made from its `RankSpec`, with all others at the same time.

    Every method but `write` is a call of all ranks, in the same order: what one of them does not reach, the others wait
    for until the deadline. Only what speakers answer is read where a method says so.
    """

    def alone(self, stream: str) -> bool:
        """Whether a pass of the model that fills `stream` holds one sample; the same at every rank."""
        ...

    def score(self, streams: Sequence[str], passes: Sequence[Sequence[TrainSample]]) -> dict[str, list[np.ndarray]]:
        """Speakers: log-probs by stream and pass, `[tokens of the pass]`. Passes may be empty."""
        ...

    def step(self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str]) -> StepPart:
        """Speakers: forward and backward of every pass, clip, update. Nothing is updated when the gradient is not
        finite. Passes may be empty."""
        ...

    def gradients(self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str]) -> dict[str, Tensor]:
        """The gradient of the step's loss by parameter name, on the CPU: each parameter's at one rank."""
        ...

    def offload(self) -> None: ...

    def onload(self) -> None: ...

    def write_weights(self, folder: Path) -> None:
        """The model's tensors under their checkpoint names, each written by one rank, whose safetensors file has a name
        of its own."""
        ...

    def snapshot(self, copy: bool) -> bool:
        """Keep weights and state as they are until both parts are written. Whether this rank has something to write."""
        ...

    def write(self, part: Literal["model", "state"], folder: Path) -> None:
        """Write what this rank has of a part of the snapshot, and forget it. No collective call: it is made beside
        training.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        ...

    def save_model(self, folder: Path) -> None: ...

    def save_state(self, folder: Path) -> None: ...

    def load_state(self, model: Path, state: Path) -> int:
        """Returns the optimizer steps that were done."""
        ...

    def peak_memory(self) -> int:
        """Bytes of this rank: of the accelerator, or resident on a CPU."""
        ...


def write_taken(taken: dict[str, Writer], part: str, folder: Path) -> None:
    """Write a part of the snapshot that a rank has taken, and forget it.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        taken.pop(part)(folder)
    except Exception as error:
        raise CheckpointError(
            f"its {part} could not be written to {folder}: {error}",
            hint="free space and resume; earlier checkpoints and every finished episode are safe",
        ) from error


def meet(spec: RankSpec) -> None:
    """Form the process group of all ranks, and load the user's own code. Who begins anew leaves the last one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    devices.set_threads(spec.threads)
    if spec.layout.tp > 1 or spec.layout.cp > 1:  # what they say to each other then hides behind their matrices
        devices.order_launches()
    if spec.device != "cpu":
        torch.cuda.set_device(spec.device)
    dist.init_process_group(
        devices.collectives(spec.device),
        store=_store(spec),
        rank=spec.rank,
        world_size=spec.world,
        timeout=timedelta(seconds=spec.config.rank_seconds),
    )
    load_files(spec.plugins)


def open_store(host: str) -> TCPStore:
    """Where ranks of several hosts meet: it listens at this process for as long as it is kept, at a port of its own."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _store(spec: RankSpec) -> Store:
    host, _, port = spec.meeting.removeprefix("tcp://").rpartition(":")
    if not spec.meeting.startswith("tcp://"):
        return FileStore(spec.meeting, spec.world)
    return TCPStore(host, int(port), spec.world, timeout=timedelta(seconds=spec.config.rank_seconds))
