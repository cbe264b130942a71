"""GRPO: the group is the baseline (DeepSeekMath, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.algos.base import Advantages, per_episode
from sluice.algos.policy import PolicyGradient
from sluice.config.algos import GRPOConfig
from sluice.types import Group, Normaliser


class GRPO(PolicyGradient):
    """A = (R - mean) / (std + eps) over the valid members of the group."""

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__(config)
        self._ddof = 1 if config.std == "sample" else 0
        self._eps = config.eps
        self._normaliser = config.normaliser

    @property
    def normaliser(self) -> Normaliser:
        return self._normaliser

    def credit(self, groups: Sequence[Group]) -> Advantages:
        return per_episode(groups, [self._standardise(returns) for returns in self.returns(groups)])

    def _standardise(self, returns: NDArray[np.float64]) -> NDArray[np.float64]:
        centred = centre(returns)
        if len(returns) <= self._ddof or not np.any(centred):
            return np.zeros_like(returns)  # one member, or all equal: nothing to compare
        return centred / (returns.std(ddof=self._ddof) + self._eps)


def centre(returns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns less their mean, exactly 0 where all are equal; an empty group stays empty."""
    if len(returns) == 0 or np.all(returns == returns[0]):
        return np.zeros_like(returns)
    return returns - returns.mean()
