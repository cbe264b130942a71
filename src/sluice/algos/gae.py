"""Generalised advantage estimation (Schulman et al., arXiv 1506.02438), in float64.

Time runs over the tokens that the policy sampled, one after the other, through all turns and segments of an
episode. What it only observed is skipped: the value after an action's last token is the value before the
next action's first one, which has seen the observation in between.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def gae(
    rewards: NDArray[np.float64], values: NDArray[np.float64], *, gamma: float, decay: float
) -> NDArray[np.float64]:
    """A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} - V_t; nothing follows the last token, V_n = 0.

    Args:
        rewards: for each sampled token, `[n]`.
        values: of the state before each sampled token, `[n]`.
        gamma: discount γ.
        decay: λ.

    Returns:
        Advantages, `[n]`.
    """
    deltas = rewards + gamma * np.append(values[1:], 0.0)[: len(values)] - values
    advantages = np.zeros(len(deltas))
    following = 0.0
    for t in range(len(deltas) - 1, -1, -1):
        following = deltas[t] + gamma * decay * following
        advantages[t] = following
    return advantages


def length_adaptive(alpha: float, length: int) -> float:
    """λ = 1 - 1/(α · length), never below 0: longer answers look further ahead (VAPO, arXiv 2504.05118 §4.2)."""
    return max(0.0, 1.0 - 1.0 / (alpha * length)) if length else 0.0
