"""One rank of a Megatron trainer: what it does in each call of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sluice import device as devices
from sluice.config.critic import CriticConfig
from sluice.train.backends.megatron import shim
from sluice.train.backends.megatron.admission import admitted
from sluice.train.base import Loss, ValueLoss, Writer
from sluice.train.ranks.spec import RankSpec
from sluice.train.ranks.weights import write_weights
from sluice.train.ranks.work import StepPart, meet, write_taken
from sluice.types import MicroBatch, TrainSample

if TYPE_CHECKING:
    from sluice.train.backends.megatron.critic import MegatronCritic
    from sluice.train.backends.megatron.sharded import ShardedModel


class MegatronWorker:
    """Implements `Worker`. Whole tensors of a stage are gathered at one rank of it, which writes them.

    Raises:
        ConfigError, TrainError: see `admitted`; before anything is allocated.
    """

    def __init__(self, spec: RankSpec) -> None:
        described = admitted(spec)
        chosen = spec.config.megatron
        meet(spec)
        shim.install()
        from sluice.train.backends.megatron.division import divide  # its import takes seconds
        from sluice.train.backends.megatron.trainer import MegatronTrainer

        torch.manual_seed(spec.seed)
        divide(chosen, seed=spec.seed)
        self._spec = spec
        self._described = described
        self._device = torch.device(spec.device)
        self._trainer = MegatronTrainer(
            spec.config, spec.model_folder, described, total_steps=spec.total_steps, device=self._device,
            frozen=spec.frozen,
        )  # fmt: skip
        self._critic: MegatronCritic | None = None
        self._taken: dict[str, Writer] = {}

    # ── the policy ──────────────────────────────────────────────────────────────────────────────────────

    def alone(self, stream: str) -> bool:
        """See `Worker.alone`: every pass may hold several samples."""
        return False

    def score(self, streams: Sequence[str], passes: Sequence[Sequence[TrainSample]]) -> dict[str, list[np.ndarray]]:
        """See `Worker.score`."""
        return {stream: self._trainer.score(stream, passes) for stream in streams}

    def step(self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str]) -> StepPart:
        """See `Worker.step`."""
        return _step(self._trainer.model, lambda: self._trainer.backward(micros, loss, streams))

    def gradients(self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str]) -> dict[str, Tensor]:
        """See `Worker.gradients`."""
        self._trainer.backward(micros, loss, streams, everywhere=True)
        found = self._trainer.model.whole_gradients()
        self._trainer.model.optimizer.zero_grad()
        return found

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────

    def offload(self) -> None:
        self._trainer.model.offload()

    def onload(self) -> None:
        self._trainer.model.onload()

    def peak_memory(self) -> int:
        """See `Worker.peak_memory`."""
        return devices.peak_memory(self._device.type)

    # ── weights and state ───────────────────────────────────────────────────────────────────────────────

    def write_weights(self, folder: Path) -> None:
        """See `Worker.write_weights`."""
        model = self._trainer.model
        weights = model.weights_in_turn()
        if model.writes:
            write_weights(folder / f"rank-{self._spec.rank:05d}.safetensors", model.whole_sizes(), weights)
        else:
            for _ in weights:  # each is a call of all ranks
                pass

    def snapshot(self, copy: bool) -> bool:
        """See `Worker.snapshot`."""
        self._taken.clear()  # room for it
        taken = self._trainer.snapshot()
        if self._trainer.model.writes:
            self._taken = {"model": taken.model, "state": taken.state}
        return bool(self._taken)

    def write(self, part: str, folder: Path) -> None:
        """See `Worker.write`."""
        write_taken(self._taken, part, folder)

    def save_model(self, folder: Path) -> None:
        self._trainer.model_writer()(folder)

    def save_state(self, folder: Path) -> None:
        self._trainer.state_writer()(folder)

    def load_state(self, model: Path, state: Path) -> int:
        """See `Worker.load_state`."""
        return self._trainer.load_state(model, state)

    # ── the critic ──────────────────────────────────────────────────────────────────────────────────────

    def begin_critic(self, config: CriticConfig, total_steps: int) -> None:
        """Build the critic beside the policy; the methods below are its own."""
        from sluice.train.backends.megatron.critic import MegatronCritic

        self._critic = MegatronCritic(
            config, self._spec.config, self._spec.model_folder, self._described, total_steps=total_steps,
            device=self._device,
        )  # fmt: skip

    def critic_score(
        self, streams: Sequence[str], passes: Sequence[Sequence[TrainSample]]
    ) -> dict[str, list[np.ndarray]]:
        """Speakers: values by stream, which is one, and pass, `[tokens of the pass]`."""
        return {stream: self._valued.score(passes) for stream in streams}

    def critic_step(self, micros: Sequence[MicroBatch], loss: ValueLoss, streams: frozenset[str]) -> StepPart:
        """As `step`."""
        return _step(self._valued.model, lambda: self._valued.backward(micros, loss, streams))

    def critic_offload(self) -> None:
        self._valued.model.offload()

    def critic_onload(self) -> None:
        self._valued.model.onload()

    def critic_snapshot(self) -> bool:
        """Keep the critic as it is until `write("critic", …)`. Whether this rank has something to write."""
        self._taken.pop("critic", None)
        taken = self._valued.snapshot()
        if self._valued.model.writes:
            self._taken["critic"] = taken
        return "critic" in self._taken

    def critic_load(self, folder: Path) -> int:
        """Returns the optimizer steps that were done."""
        return self._valued.load_state(folder)

    @property
    def _valued(self) -> MegatronCritic:
        assert self._critic is not None, "begin_critic comes first"
        return self._critic


def _step(model: ShardedModel, backward: Callable[[], Any]) -> StepPart:
    """Gradients, clip, update. Nothing is updated when the gradient is not finite."""
    results = backward()
    norm = model.optimizer.grad_norm()
    rate = model.optimizer.update(norm) if isfinite(norm) else 0.0
    return StepPart(tuple(result and result.portable() for result in results), norm, rate)
