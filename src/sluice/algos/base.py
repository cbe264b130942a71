"""What an algorithm is: credit in float64 numpy, a loss over tensors, and the streams it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sluice.config.critic import CriticConfig
from sluice.types import Group, LossInputs, LossOutput, Normaliser, Scored, TrainSample, ValueInputs

SampleKey: TypeAlias = tuple[str, int]
Advantages: TypeAlias = Mapping[SampleKey, NDArray[np.float64]]
"""Per-token advantages of each sample, shape `[len(sample)]`, by (episode id, segment)."""


class Algorithm(Protocol):
    """One RL method. `orchestrate` hands its `loss` to the trainer, which knows nothing else of it.

    Attributes:
        requires: streams that scoring must fill before `credit`: of proximal, reference, teacher:NAME, value.
        normaliser, constant: what the step's loss is divided by; see `sluice.types.Normaliser`.
        updates_per_batch: mini-batches of one batch; they share one scoring and one credit.
    """

    @property
    def requires(self) -> frozenset[str]: ...

    @property
    def normaliser(self) -> Normaliser: ...

    @property
    def constant(self) -> float: ...

    @property
    def updates_per_batch(self) -> int: ...

    def credit(self, groups: Sequence[Group]) -> Advantages:
        """Advantages of every sample of every valid member, group and batch statistics included."""
        ...

    def loss(self, inputs: LossInputs) -> LossOutput: ...


@runtime_checkable
class ActorCritic(Algorithm, Protocol):
    """An algorithm that requires the `value` stream and says how the model that fills it is trained.

    Attributes:
        critic: how it is trained.
    """

    @property
    def critic(self) -> CriticConfig: ...

    def targets(self, groups: Sequence[Group]) -> Advantages:
        """What the critic is to predict before each token: the `return` stream, shaped as advantages are."""
        ...

    def value_loss(self, inputs: ValueInputs) -> LossOutput: ...


Unit: TypeAlias = Sequence[TrainSample]
"""Samples that a supervised phase keeps in one step: a demonstration, or the answers of a pair."""


class Objective(Protocol):
    """What a phase before RL minimises. Like an algorithm it is handed to a trainer that knows nothing of it.

    Attributes:
        requires: streams that scoring fills before `credit`.
        normaliser, constant: what the step's loss is divided by; see `sluice.types.Normaliser`.
    """

    @property
    def requires(self) -> frozenset[str]: ...

    @property
    def normaliser(self) -> Normaliser: ...

    @property
    def constant(self) -> float: ...

    def credit(self, units: Sequence[Unit]) -> Advantages:
        """What each token of the step weighs, the `advantage` stream."""
        ...

    def loss(self, inputs: LossInputs) -> LossOutput: ...

    def report(self, units: Sequence[Unit]) -> Mapping[str, float]:
        """Figures of a step from its scored units; a `loss` among them stands for the trainer's own."""
        ...


def sampled_mask(sample: TrainSample) -> NDArray[np.bool_]:
    """Tokens the policy sampled and this segment owns, shape `[len(sample)]`; stale ones included."""
    return sample["version"] >= 0


def per_episode(groups: Sequence[Group], values: Sequence[NDArray[np.float64]]) -> Advantages:
    """Spread one value per valid member over its sampled tokens.

    Args:
        groups: the groups of the step.
        values: one array of shape `[len(group.valid)]` per group.
    """
    spread: dict[SampleKey, NDArray[np.float64]] = {}
    for group, group_values in zip(groups, values, strict=True):
        for member, value in zip(group.valid, group_values, strict=True):
            for sample in member.samples:
                spread[sample.key] = np.where(sampled_mask(sample), float(value), 0.0)
    return spread


def samples_of(groups: Sequence[Group]) -> Iterator[TrainSample]:
    """Samples of all valid members, in order."""
    for group in groups:
        for member in group.valid:
            yield from member.samples


def total_reward(member: Scored) -> float:
    """Total reward of a valid member."""
    assert member.reward is not None  # a valid member has one, held by Scored
    return member.reward.total
