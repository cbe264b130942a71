"""One rank: the torch trainer over its shards, and what it does in each call of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from sluice import device as devices
from sluice.config.train import TrainConfig
from sluice.errors import CheckpointError
from sluice.plugins import load_files
from sluice.train.backends.torch import TorchTrainer
from sluice.train.base import Loss, Writer
from sluice.train.sharding import Shards, gathered
from sluice.train.totals import MicroResult
from sluice.types import MicroBatch, TrainSample


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What a rank needs to begin.

    Attributes:
        rank, world: which one of how many.
        meeting: where the process group forms: a file that all ranks see and nobody has used before, or
            `tcp://host:port`, where rank 0 listens.
        model_folder, total_steps, seed, frozen, config: see `TorchTrainer`.
        device: `cpu`, or `cuda:N` of this process.
        plugins: files of the user's own code that were loaded in the controller.
        threads: of torch; None leaves its choice.
    """

    rank: int
    world: int
    meeting: str
    config: TrainConfig
    model_folder: Path
    total_steps: int
    seed: int
    device: str
    frozen: Mapping[str, Path]
    plugins: tuple[Path, ...] = ()
    threads: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StepPart:
    """A rank's share of an optimizer step.

    Attributes:
        results: of its passes, on the CPU; None where it had nothing to train.
        grad_norm: of the whole model, the same at every rank.
        lr: rate that was used; 0 when the gradient was not finite and nothing was updated.
    """

    results: tuple[MicroResult | None, ...]
    grad_norm: float
    lr: float


class RankWorker:
    """Forms the process group with the other ranks and builds the sharded trainer.

    Every method is a call of all ranks, in the same order: what one of them does not reach, the others wait for until
    the deadline.
    """

    def __init__(self, spec: RankSpec) -> None:
        devices.set_threads(spec.threads)
        kind = spec.device.partition(":")[0]
        if kind == "cuda":
            torch.cuda.set_device(spec.device)
        dist.init_process_group(
            devices.collectives(spec.device),
            store=_store(spec),
            rank=spec.rank,
            world_size=spec.world,
            timeout=timedelta(seconds=spec.config.rank_seconds),
        )
        load_files(spec.plugins)
        self._shards = Shards(kind, getattr(torch, spec.config.dtype))
        self._trainer = TorchTrainer(
            spec.config, spec.model_folder, total_steps=spec.total_steps, seed=spec.seed, device=spec.device,
            frozen=spec.frozen, shards=self._shards,
        )  # fmt: skip
        self._taken: dict[str, Writer] = {}

    def score(self, streams: Sequence[str], passes: Sequence[Sequence[TrainSample]]) -> dict[str, list[np.ndarray]]:
        """Log-probs by stream and pass, `[tokens of the pass]`."""
        found = {stream: [self._trainer.score_pass(stream, samples) for samples in passes] for stream in streams}
        for stream in streams:
            self._trainer.packed(stream).rest()
        return found

    def alone(self, stream: str) -> bool:
        """Whether a pass of the model that fills `stream` holds one sample."""
        return self._trainer.packed(stream).alone

    def step(self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str]) -> StepPart:
        """Forward and backward of every pass, clip, update. Nothing is updated when the gradient is not finite."""
        optimizer = self._trainer.optimizer
        results = self._backward(micros, loss, streams)
        norm = optimizer.grad_norm()
        rate = optimizer.update(norm) if bool(torch.isfinite(norm)) else 0.0
        optimizer.zero_grad()
        return StepPart(results, float(norm), rate)

    def gradients(self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str]) -> dict[str, Tensor]:
        """The gradient of the step's loss by parameter name, at the first rank; empty at the others."""
        self._backward(micros, loss, streams)
        found = {name: gathered(value) for name, value in self._trainer.optimizer.gradients().items()}
        self._trainer.optimizer.zero_grad()
        return {name: value.cpu() for name, value in found.items()} if self._shards.rank == 0 else {}

    def _backward(
        self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str]
    ) -> tuple[MicroResult | None, ...]:
        self._trainer.optimizer.zero_grad()
        return tuple(_portable(self._trainer.train_pass(micro, loss, streams)) for micro in micros)

    def offload(self) -> None:
        self._trainer.offload()

    def onload(self) -> None:
        self._trainer.onload()

    def write_weights(self, file: Path) -> None:
        """The model's tensors under their checkpoint names, by the first rank, in one safetensors file."""
        weights = dict(self._trainer.named_weights())
        if self._shards.rank == 0:
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, file)

    def snapshot(self, copy: bool) -> None:
        """Of all ranks, kept at the first until `write` has written it."""
        self._taken.clear()  # room for it
        taken = self._trainer.snapshot(copy=copy)
        if self._shards.rank == 0:
            self._taken = {"model": taken.model, "state": taken.state}

    def write(self, part: str, folder: Path) -> None:
        """Write `model` or `state` of the snapshot, and forget it. No collective call: for the first rank alone.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            self._taken.pop(part)(folder)
        except Exception as error:
            raise CheckpointError(
                f"its {part} could not be written to {folder}: {error}",
                hint="free space and resume; earlier checkpoints and every finished episode are safe",
            ) from error

    def save_model(self, folder: Path) -> None:
        self._trainer.save_model(folder)

    def save_state(self, folder: Path) -> None:
        self._trainer.save_state(folder)

    def load_state(self, model: Path, state: Path) -> int:
        """Returns the optimizer steps that were done."""
        self._trainer.load_state(model, state)
        return self._trainer.optimizer.steps_done

    def peak_memory(self) -> int:
        """Bytes of this rank: of the accelerator, or resident on a CPU."""
        return self._trainer.peak_memory()[0]


def _store(spec: RankSpec) -> Store:
    host, _, port = spec.meeting.removeprefix("tcp://").rpartition(":")
    if not spec.meeting.startswith("tcp://"):
        return FileStore(spec.meeting, spec.world)
    seconds = timedelta(seconds=spec.config.rank_seconds)
    return TCPStore(host, int(port), spec.world, is_master=spec.rank == 0, timeout=seconds)


def _portable(result: MicroResult | None) -> MicroResult | None:
    if result is None:
        return None
    return replace(
        result,
        loss=result.loss.detach().cpu(),
        logprobs=result.logprobs.cpu(),
        entropy=result.entropy.detach().cpu(),
        per_token=result.per_token.cpu(),
        metrics={name: values.cpu() for name, values in result.metrics.items()},
    )
