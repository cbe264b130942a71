"""One rank: the torch trainer over its shards, and what it does in each call of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sluice.train.backends.torch import TorchTrainer
from sluice.train.base import Loss, Writer
from sluice.train.ranks.spec import RankSpec
from sluice.train.ranks.weights import sizes_of, write_weights
from sluice.train.ranks.work import StepPart, meet, write_taken
from sluice.train.sharding import Shards, gathered
from sluice.train.totals import MicroResult
from sluice.types import MicroBatch, TrainSample


class RankWorker:
    """Implements `Worker`. Every rank is a replica; whole tensors are gathered at the first, which writes them."""

    def __init__(self, spec: RankSpec) -> None:
        meet(spec)
        kind = spec.device.partition(":")[0]
        self._shards = Shards(kind, getattr(torch, spec.config.dtype))
        self._trainer = TorchTrainer(
            spec.config, spec.model_folder, total_steps=spec.total_steps, seed=spec.seed, device=spec.device,
            frozen=spec.frozen, shards=self._shards,
        )  # fmt: skip
        self._taken: dict[str, Writer] = {}

    def score(self, streams: Sequence[str], passes: Sequence[Sequence[TrainSample]]) -> dict[str, list[np.ndarray]]:
        """See `Worker.score`."""
        found = {stream: [self._trainer.score_pass(stream, samples) for samples in passes] for stream in streams}
        for stream in streams:
            self._trainer.packed(stream).rest()
        return found

    def alone(self, stream: str) -> bool:
        """See `Worker.alone`."""
        return self._trainer.packed(stream).alone

    def step(self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str]) -> StepPart:
        """See `Worker.step`."""
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
        found = (self._trainer.train_pass(micro, loss, streams) for micro in micros)
        return tuple(result and result.portable() for result in found)

    def offload(self) -> None:
        self._trainer.offload()

    def onload(self) -> None:
        self._trainer.onload()

    def write_weights(self, folder: Path) -> None:
        """See `Worker.write_weights`."""
        weights = dict(self._trainer.named_weights())
        if self._shards.rank == 0:
            file = folder / "model.safetensors"
            write_weights(file, sizes_of(weights), weights.items())

    def snapshot(self, copy: bool) -> bool:
        """See `Worker.snapshot`."""
        self._taken.clear()  # room for it
        taken = self._trainer.snapshot(copy=copy)
        if self._shards.rank == 0:
            self._taken = {"model": taken.model, "state": taken.state}
        return bool(self._taken)

    def write(self, part: str, folder: Path) -> None:
        """See `Worker.write`."""
        write_taken(self._taken, part, folder)

    def save_model(self, folder: Path) -> None:
        self._trainer.save_model(folder)

    def save_state(self, folder: Path) -> None:
        self._trainer.save_state(folder)

    def load_state(self, model: Path, state: Path) -> int:
        """See `Worker.load_state`."""
        self._trainer.load_state(model, state)
        return self._trainer.optimizer.steps_done

    def peak_memory(self) -> int:
        """See `Worker.peak_memory`."""
        return self._trainer.peak_memory()[0]
