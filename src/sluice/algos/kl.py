"""Estimators of KL(policy || reference) from sampled tokens.

With d = log π(a) - log π_ref(a), a drawn from π (Schulman 2020, "Approximating KL divergence"):
k1 = d (unbiased, high variance), k2 = d²/2 (biased, low variance), k3 = exp(-d) - 1 + d (unbiased, low
variance, never negative).

Which side is differentiated. The reference never carries a gradient. In the reward nothing does: credit turns the
estimate at the proximal policy into advantages, and its expected gradient is that of KL(π || π_ref). In the loss the
estimate is differentiated through log π at the sampled token, and the draw itself is not, so the gradients differ
from those of what is estimated: ∇k1 = ∇log π, 0 on average; ∇k2 = d ∇log π, on average the gradient of
KL(π || π_ref); ∇k3 = (1 - exp(-d)) ∇log π, on average the gradient of KL(π_ref || π).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
LARGEST_EXPONENT = 20.0
"""k3 grows as exp(-d); beyond this it goes on flat, so that float32 holds it."""


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
    if isinstance(difference, np.ndarray):
        return np.exp(np.minimum(-difference, LARGEST_EXPONENT)) - 1 + difference
    return (-difference).clamp(max=LARGEST_EXPONENT).exp() - 1 + difference
