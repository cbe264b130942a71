"""REINFORCE++: no group baseline, advantages normalised over the whole batch (arXiv 2501.03262)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.algos.base import Advantages, SampleKey, sampled_mask, total_reward
from sluice.algos.policy import PolicyGradient
from sluice.config.algos import ReinforcePPConfig
from sluice.types import Group, Normaliser


class ReinforcePP(PolicyGradient):
    """A_t = R - Σ_{i≥t} penalty_i, then (A - mean) / (std + eps) over all sampled tokens of the batch.

    The sum runs inside a segment; segments of one episode share its reward.
    """

    def __init__(self, config: ReinforcePPConfig) -> None:
        super().__init__(config)
        self._eps = config.eps
        self._normaliser = config.normaliser

    @property
    def normaliser(self) -> Normaliser:
        return self._normaliser

    def credit(self, groups: Sequence[Group]) -> Advantages:
        raw: dict[SampleKey, NDArray[np.float64]] = {}
        masks: dict[SampleKey, NDArray[np.bool_]] = {}
        for group in groups:
            for member in group.valid:
                for sample in member.samples:
                    to_go = np.cumsum(self.token_penalty(sample)[::-1])[::-1]
                    raw[sample.key] = total_reward(member) - to_go
                    masks[sample.key] = sampled_mask(sample)
        if not raw:
            return {}
        values = np.concatenate([raw[key][masks[key]] for key in raw])
        if len(values) == 0 or np.all(values == values[0]):
            return {key: np.zeros_like(tokens) for key, tokens in raw.items()}
        mean, std = values.mean(), values.std()
        return {key: np.where(masks[key], (tokens - mean) / (std + self._eps), 0.0) for key, tokens in raw.items()}
