"""The critic of one rank: the policy's architecture with a scalar head, divided as the policy is.

Its layers start from the policy's first weights, its head from zero, as the torch backend's critic does; its files are
that critic's too. Every method is a call of all ranks, in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sluice.config.critic import CriticConfig
from sluice.config.train import TrainConfig
from sluice.train.backends.critic import WEIGHT, over_values
from sluice.train.backends.megatron.families import Architecture, Parameter
from sluice.train.backends.megatron.families.splits import Replicated
from sluice.train.backends.megatron.folder import Reader
from sluice.train.backends.megatron.owned import Own
from sluice.train.backends.megatron.saving import SavedState, optimizer_writer
from sluice.train.backends.megatron.sharded import ShardedModel
from sluice.train.base import ValueLoss, Writer
from sluice.train.totals import MicroResult
from sluice.types import MicroBatch, TrainSample

_HEAD = "output_layer."


class MegatronCritic:
    """See `train.base.Critic`.

    Args:
        config: its optimizer.
        train: precision, memory and layout.
        model_folder: Hugging Face folder of the policy's first weights.
        described: what is in it.
        total_steps: updates of the critic over the run, for its schedule.
        device: of this rank.
    """

    def __init__(
        self,
        config: CriticConfig,
        train: TrainConfig,
        model_folder: Path,
        described: Architecture,
        *,
        total_steps: int,
        device: torch.device,
    ) -> None:
        self._described = _with_value_head(described)
        self.model = ShardedModel(
            train, config.optimizer, self._described, total_steps=total_steps, device=device, values=True
        )
        first = {each.name: each for each in described.parameters}
        with Reader(model_folder, described) as reader:

            def read(own: Own) -> Tensor:
                if own.described.name.startswith(_HEAD):
                    return torch.zeros(own.part.shape)
                return reader.part(first[own.described.name], *self.model.place)

            self.model.load(read)

    def score(self, passes: Sequence[Sequence[TrainSample]]) -> list[np.ndarray]:
        """The value before each token; see `ShardedModel.score`."""
        return self.model.score(passes)

    def backward(
        self, micros: Sequence[MicroBatch], loss: ValueLoss, streams: frozenset[str]
    ) -> tuple[MicroResult | None, ...]:
        """See `ShardedModel.backward`."""
        return self.model.backward(micros, over_values(loss), streams)

    def snapshot(self) -> Writer:
        """See `Critic.snapshot`; a copy always."""
        weights = {f"{WEIGHT}/{name}": tensor for name, tensor in self.model.whole_weights().items()}
        return optimizer_writer({**self.model.whole_state(), **weights}, self.model.optimizer.steps_done)

    def load_state(self, folder: Path) -> int:
        """See `Critic.load_state`. Returns the optimizer steps that were done."""
        with (
            self.model.on_device(),
            SavedState(folder, self._described, masters=self.model.has_master, also=(WEIGHT,)) as saved,
        ):
            self.model.load(lambda own: saved.part(WEIGHT, own.described, *self.model.place))
            self.model.restore(saved)
            return saved.steps_done


def _with_value_head(described: Architecture) -> Architecture:
    """The critic's own names: those of the torch backend's."""
    kept = [
        dataclasses.replace(each, tensors=tuple(f"layers.{name.removeprefix('model.')}" for name in each.tensors))
        for each in described.parameters
        if not each.name.startswith(_HEAD)
    ]
    head = [
        Parameter(f"{_HEAD}weight", ("head.weight",), ((1, described.hidden),), Replicated()),
        Parameter(f"{_HEAD}bias", ("head.bias",), ((1,),), Replicated()),
    ]
    return dataclasses.replace(described, tied=False, parameters=(*kept, *head))
