"""RLOO: each episode against the mean of the others (arXiv 2402.14740)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.algos.base import Advantages, per_episode
from sluice.algos.grpo import centre
from sluice.algos.policy import PolicyGradient
from sluice.types import Group


class RLOO(PolicyGradient):
    """A_i = R_i - mean_{j≠i} R_j = n/(n-1) · (R_i - mean); zero for a single valid member."""

    def credit(self, groups: Sequence[Group]) -> Advantages:
        return per_episode(groups, [leave_one_out(returns) for returns in self.returns(groups)])


def leave_one_out(returns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each return less the mean of the others, shape of the input."""
    n = len(returns)
    return centre(returns) * (n / (n - 1)) if n > 1 else np.zeros_like(returns)
