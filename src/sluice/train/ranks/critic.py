"""A critic over the ranks of the policy's trainer: the controller's side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sluice.config.critic import CriticConfig
from sluice.train.base import CriticStats, ValueLoss, Writer
from sluice.train.ranks.replicas import Replicas
from sluice.train.schedule import learning_rate
from sluice.types import TrainBatch, TrainSample

_VALUE = "value"


class RankedCritic:
    """Implements `train.base.Critic`. It has the layout of the policy, and ends with its ranks.

    Args:
        replicas: of a trainer whose backend has critics.
        config: the critic's optimizer.
        total_steps: its updates over the run, for its schedule.
    """

    def __init__(self, replicas: Replicas, config: CriticConfig, *, total_steps: int) -> None:
        self._replicas = replicas
        self._config = config
        self._total_steps = total_steps
        self._steps_done = 0
        replicas.all("begin_critic", config, total_steps)

    def score(self, samples: Sequence[TrainSample]) -> list[TrainSample]:
        """See `Critic.score`."""
        return self._replicas.score("critic_score", samples, (_VALUE,), alone=False) if samples else []

    def step(self, batch: TrainBatch, loss: ValueLoss) -> CriticStats:
        """See `Critic.step`."""
        if not any(sample.num_trained_tokens for sample in batch.samples):
            rate = learning_rate(self._config.optimizer, self._steps_done, self._total_steps)
            return CriticStats(0.0, 0.0, rate, {})
        stats = self._replicas.step("critic_step", batch, loss, alone=False)
        self._steps_done += 1
        return CriticStats(stats.loss, stats.grad_norm, stats.lr, stats.metrics)

    def offload(self) -> None:
        """See `Critic.offload`."""
        self._replicas.all("critic_offload")

    def onload(self) -> None:
        """See `Critic.onload`."""
        self._replicas.all("critic_onload")

    def snapshot(self, *, copy: bool = True) -> Writer:
        """See `Critic.snapshot`; a copy always."""
        holders = [rank for rank, holds in enumerate(self._replicas.all("critic_snapshot")) if holds]
        return self._replicas.writer("critic", holders)

    def save_state(self, folder: Path) -> None:
        """See `Critic.save_state`."""
        self.snapshot()(folder)

    def load_state(self, folder: Path) -> None:
        """See `Critic.load_state`."""
        self._steps_done = int(self._replicas.all("critic_load", folder.absolute())[0])
