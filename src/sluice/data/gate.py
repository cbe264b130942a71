"""The gate between rollout and training, as arithmetic: how many groups may be alive, what is too old.

`data.pacing` bounds the groups alive, so that in dispatch order the bound holds without discarding anything. In
completion order an unlucky group can be overtaken; then `judge` takes its old tokens, or the whole episode,
out of the loss.

Over-sampling. `oversample` adds ⌈(oversample − 1) · groups_per_step⌉ groups to those alive, in completion order
only: a batch is the first `groups_per_step` that settle, the rest are carried over. Stragglers get older for it.

Staleness is recomputed when a batch is used, from the versions recorded with the tokens, along the
lineage: never from counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sluice.config.data import GateConfig, OnStale
from sluice.data.pacing import Pacing
from sluice.errors import DataError
from sluice.types import TrainSample, Version

LagOf: TypeAlias = Callable[[Version], int]
"""Steps between the version in use and another, along the lineage."""


@dataclass(frozen=True, slots=True)
class Gate:
    """See the module. `updates` is the optimizer steps of one batch."""

    config: GateConfig
    groups_per_step: int
    updates: int = 1

    @property
    def pacing(self) -> Pacing:
        """The credits of this gate."""
        extra = round((self.config.oversample - 1) * self.groups_per_step, 6)  # 1.1 · 10 is 11 groups, not 12
        return Pacing(self.config.max_lag, self.groups_per_step, self.updates, math.ceil(extra))

    @property
    def max_alive(self) -> int:
        """Groups that may be alive at once."""
        return self.pacing.limit

    def admits(self, alive: int) -> int:
        """How many more groups may be dispatched while `alive` are."""
        return self.pacing.credits(alive)

    def judge(self, samples: tuple[TrainSample, ...], lag_of: LagOf) -> Judgement:
        """Take what is older than the bound out of the loss of one episode.

        Args:
            samples: the samples of one episode.
            lag_of: lag of a version against the one in use.

        Returns:
            The samples with a `lag` stream and stale tokens at weight 0, and what was counted.

        Raises:
            DataError: something is stale although the gate waits; that is a defect, not a policy.
        """
        codes = {int(code) for sample in samples for code in np.unique(sample["version"]) if code >= 0}
        lags = {code: lag_of(Version.from_code(code)) for code in codes}
        oldest = max(lags.values(), default=0)
        samples = tuple(sample.with_streams(lag=_lag_stream(sample, lags)) for sample in samples)
        stale = [code for code, lag in lags.items() if lag > self.config.max_lag]
        if not stale:
            return Judgement(samples, oldest, 0, "")
        if self.config.effective_on_stale is OnStale.WAIT:
            raise DataError(
                f"episode {samples[0].episode_id} is {oldest} steps behind although the gate waits at "
                f"max_lag = {self.config.max_lag}: the pacing bound was broken",
                hint="please report this with the run's log; gate.on_stale = 'mask_tokens' trains on",
            )
        drop = self.config.effective_on_stale is OnStale.DROP
        judged: list[TrainSample] = []
        masked = 0
        for sample in samples:
            old = np.ones(len(sample), np.bool_) if drop else np.isin(sample["version"], stale)
            masked += int(np.count_nonzero(old & sample.trained))
            judged.append(sample.with_streams(weight=np.where(old, 0.0, sample["weight"])))
        reason = f"stale: lag {oldest} > {self.config.max_lag}"
        return Judgement(tuple(judged), oldest, masked, reason if drop else "")


def _lag_stream(sample: TrainSample, lags: Mapping[int, int]) -> NDArray[np.int32]:
    """Lag of every sampled token, -1 elsewhere, shape `[len(sample)]`."""
    stream = np.full(len(sample), -1, np.int32)
    for code, lag in lags.items():
        stream[sample["version"] == code] = lag
    return stream


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the gate decided about one episode.

    Attributes:
        samples: the samples, stale tokens at weight 0.
        lag: of the oldest token, in optimizer steps.
        masked_tokens: tokens taken out of the loss.
        dropped: why the episode left the loss altogether; empty when it did not.
    """

    samples: tuple[TrainSample, ...]
    lag: int
    masked_tokens: int
    dropped: str
