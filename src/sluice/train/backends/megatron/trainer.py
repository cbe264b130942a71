"""The Megatron trainer of one rank: the policy. Every method is a call of all ranks, in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from sluice.config.train import TrainConfig
from sluice.errors import CheckpointError, TrainError
from sluice.train.backends.megatron.families import Architecture
from sluice.train.backends.megatron.frozen import FrozenWeights
from sluice.train.backends.megatron.saving import SavedState, model_writer, optimizer_writer
from sluice.train.backends.megatron.sharded import ShardedModel
from sluice.train.backends.state import check_same_architecture
from sluice.train.base import Loss, Snapshot, Writer
from sluice.train.totals import MicroResult
from sluice.types import MicroBatch, TrainSample


class MegatronTrainer:
    """Builds and loads this rank's part of the policy, scores and trains.

    Args:
        config: with the layout in `train.megatron`, for as many ranks as the default process group has.
        model_folder: Hugging Face folder of the initial weights, which also are the reference.
        described: what is in it.
        total_steps: optimizer steps of the run, for the schedule.
        device: of this rank.
        frozen: folders of further policies by the stream that they fill.

    Raises:
        TrainError: a tensor is missing, unknown, or of another shape.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_folder: Path,
        described: Architecture,
        *,
        total_steps: int,
        device: torch.device,
        frozen: Mapping[str, Path] | None = None,
    ) -> None:
        self._config = config
        self._folder = model_folder
        self._described = described
        self.model = ShardedModel(config, config.optimizer, described, total_steps=total_steps, device=device)
        folders = {"reference": model_folder, **(frozen or {})}
        self._frozen = FrozenWeights(folders, described, self.model.held, self.model.place)
        self.model.load_folder(model_folder)

    def score(self, stream: str, passes: Sequence[Sequence[TrainSample]]) -> list[np.ndarray]:
        """Log-probs of all tokens of each pass end to end, by the policy that fills `stream`."""
        self.model.optimizer.settle()  # before others' weights stand where this rank still lacks what replicas updated
        with nullcontext() if stream == "proximal" else self._frozen.in_place(stream):
            return self.model.score(passes)

    def backward(
        self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str], *, everywhere: bool = False
    ) -> tuple[MicroResult | None, ...]:
        """See `ShardedModel.backward`."""
        return self.model.backward(micros, loss, streams, everywhere=everywhere)

    def snapshot(self) -> Snapshot:
        """See `Trainer.snapshot`; a call of all ranks, of which those that write get something to write.

        It is always a copy: the parts of several ranks are put together on the way.
        """
        return Snapshot(self.model_writer(), self.state_writer())

    def model_writer(self) -> Writer:
        """Of a snapshot's weights alone."""
        return model_writer(self._folder, self.model.whole_weights(), self._config.dtype)

    def state_writer(self) -> Writer:
        """Of a snapshot's state alone."""
        return optimizer_writer(self.model.whole_state(), self.model.optimizer.steps_done)

    def load_state(self, model: Path, state: Path) -> int:
        """See `Trainer.load_state`. Returns the optimizer steps that were done."""
        check_same_architecture(model, self._described.config)
        with self.model.on_device():
            return self._load_state(model, state)

    def _load_state(self, model: Path, state: Path) -> int:
        try:
            self.model.load_folder(model)
        except TrainError as error:
            raise CheckpointError(str(error), hint="resume from an older checkpoint") from error
        with SavedState(state, self._described, masters=self.model.has_master) as saved:
            self.model.restore(saved)
            return saved.steps_done
