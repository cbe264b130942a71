"""Estimators of KL(policy || reference) from sampled tokens.

With d = log π(a) - log π_ref(a), a drawn from π (Schulman 2020, "Approximating KL divergence"):
k1 = d (unbiased, high variance), k2 = d²/2 (biased, low variance), k3 = exp(-d) - 1 + d (unbiased, low
variance, never negative).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


@overload
def kl_estimate(estimator: Estimator, logprob: Tensor, reference: Tensor) -> Tensor: ...
@overload
def kl_estimate(
    estimator: Estimator, logprob: NDArray[np.float64], reference: NDArray[np.float64]
) -> NDArray[np.float64]: ...
def kl_estimate(estimator: Estimator, logprob: Any, reference: Any) -> Any:
    """Per-token estimate in nats, of the shape of its inputs; torch tensors keep their gradient."""
    difference = logprob - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    exp = np.exp if isinstance(difference, np.ndarray) else type(difference).exp
    return exp(-difference) - 1 + difference
