"""GRPO: the group is the baseline (DeepSeekMath, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.algos.base import Advantages, per_episode
from sluice.algos.policy import PolicyGradient
from sluice.config.algos import GroupConfig
from sluice.types import Group


class GRPO(PolicyGradient):
    """A = (R - mean) / (std + eps) over the valid members of the group.

    DAPO, IcePop and decoupled PPO are this class with other defaults.
    """

    def __init__(self, config: GroupConfig, *, max_new_tokens: int | None = None) -> None:
        super().__init__(config, max_new_tokens=max_new_tokens)
        self._std = config.std
        self._eps = config.eps

    def credit(self, groups: Sequence[Group]) -> Advantages:
        return per_episode(groups, [self._standardise(returns) for returns in self.returns(groups)])

    def _standardise(self, returns: NDArray[np.float64]) -> NDArray[np.float64]:
        centred = centre(returns)
        if self._std == "none":
            return centred
        ddof = 1 if self._std == "sample" else 0
        if len(returns) <= ddof or not np.any(centred):
            return np.zeros_like(returns)  # one member, or all equal: nothing to compare
        return centred / (returns.std(ddof=ddof) + self._eps)


def centre(returns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns less their mean, exactly 0 where all are equal; an empty group stays empty."""
    if len(returns) == 0 or np.all(returns == returns[0]):
        return np.zeros_like(returns)
    return returns - returns.mean()
