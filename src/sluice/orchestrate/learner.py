"""What happens to a batch between the gate and publication: scoring, credit, updates of critic and policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sluice.algos.base import ActorCritic, Algorithm, samples_of
from sluice.train.base import Critic, CriticStats, StepStats, Trainer
from sluice.train.packing import make_batch
from sluice.types import Group, TrainBatch, TrainSample

VALUE = "value"
"""The stream that the critic fills."""


class Learner:
    """Hands the algorithm's losses to trainer and critic.

    Args:
        trainer: of the policy.
        critic: of an `ActorCritic`, None for any other algorithm.
        micro_batch_tokens: budget of one forward and backward pass.
    """

    def __init__(
        self, trainer: Trainer, algorithm: Algorithm, critic: Critic | None, *, micro_batch_tokens: int
    ) -> None:
        self._trainer = trainer
        self._algorithm = algorithm
        self._critic = critic
        self._budget = micro_batch_tokens

    def score(self, groups: list[Group]) -> list[Group]:
        """Fill the streams that the algorithm requires."""
        requires = self._algorithm.requires
        if not requires:
            return groups
        samples = list(samples_of(groups))
        if requires - {VALUE}:
            samples = self._trainer.score(samples, requires - {VALUE})
        if self._critic is not None:
            samples = self._critic.score(samples)
        scored = {sample.key: sample for sample in samples}
        return [
            replace(
                group,
                members=tuple(
                    replace(m, samples=tuple(scored.get(s.key, s) for s in m.samples)) for m in group.members
                ),
            )
            for group in groups
        ]

    def credit(self, groups: list[Group]) -> list[list[TrainSample]]:
        """Samples with advantages (and returns), one list per optimizer update."""
        algorithm = self._algorithm
        streams = {"advantage": algorithm.credit(groups)}
        if isinstance(algorithm, ActorCritic):
            streams["return"] = algorithm.targets(groups)
        size = len(groups) // algorithm.updates_per_batch
        return [
            [
                sample.with_streams(**{name: values[sample.key] for name, values in streams.items()})
                for sample in samples_of(groups[start : start + size])
            ]
            for start in range(0, len(groups), size)
        ]

    def update(self, updates: Sequence[Sequence[TrainSample]], batch: int) -> tuple[list[StepStats], dict[str, float]]:
        """Every update of one batch.

        Args:
            updates: what `credit` gave.
            batch: how many batches the run has trained before.

        Returns:
            What each step of the policy did, and metrics of the critic. While the critic warms up alone the
            policy's steps are counted as ever, and skipped.
        """
        algorithm, metrics = self._algorithm, dict[str, float]()
        warming = isinstance(algorithm, ActorCritic) and batch < algorithm.critic.warmup_batches
        stats: list[StepStats] = []
        judged: list[CriticStats] = []
        if self._critic is not None:
            metrics |= value_metrics([sample for samples in updates for sample in samples])
        for samples in updates:
            train = self._batch([sample for sample in samples if sample.num_trained_tokens])
            if self._critic is not None and isinstance(algorithm, ActorCritic):
                judged += [self._critic.step(train, algorithm.value_loss) for _ in range(algorithm.critic.updates)]
            stats.append(self._trainer.step(self._batch([]) if warming else train, algorithm.loss))
        return stats, metrics | critic_metrics(judged)

    def _batch(self, samples: list[TrainSample]) -> TrainBatch:
        algorithm = self._algorithm
        return make_batch(samples, budget=self._budget, normaliser=algorithm.normaliser, constant=algorithm.constant)


def value_metrics(samples: Sequence[TrainSample]) -> dict[str, float]:
    """How well the values at the start of the batch foretell the returns, over trained tokens.

    Explained variance is 1 - Var(return - value) / Var(return): 1 is perfect, 0 no better than a constant. It
    is left out where the returns do not vary.
    """
    trained = [sample for sample in samples if sample.num_trained_tokens]
    if not trained:
        return {}
    values = np.concatenate([sample[VALUE][sample.trained] for sample in trained]).astype(np.float64)
    returns = np.concatenate([sample["return"][sample.trained] for sample in trained])
    metrics = {"critic/value_mean": float(values.mean()), "critic/return_mean": float(returns.mean())}
    if returns.var() > 0:
        metrics["critic/explained_variance"] = float(1 - (returns - values).var() / returns.var())
    return metrics


def critic_metrics(stats: Sequence[CriticStats]) -> dict[str, float]:
    """Means over the critic's updates of one batch."""
    if not stats:
        return {}
    metrics = {
        "critic/loss": float(np.mean([stat.loss for stat in stats])),
        "critic/grad_norm": float(np.mean([stat.grad_norm for stat in stats])),
        "critic/lr": stats[-1].lr,
    }
    for name in dict.fromkeys(name for stat in stats for name in stat.metrics):
        found = [stat.metrics[name] for stat in stats if name in stat.metrics]
        metrics[f"critic/{name}"] = float(np.mean(found))
    return metrics
