"""Direct preference optimisation (arXiv 2305.18290), exact for any split into micro-batches.

For N pairs of a chosen and a rejected answer, with log π(y) the sum over the answer's own tokens,

    L = -1/N Σ log σ(m),    m = β [(log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log π_ref(rejected))].

With d log σ(m)/dm = σ(-m) the gradient is

    ∇L = -1/N Σ β σ(-m) [Σ_t ∇ log π(chosen_t) - Σ_t ∇ log π(rejected_t)]:

linear in the gradients of the tokens' log-probs, and σ(-m) is all that ties the two answers together. `credit`
works it out in float64 from the streams `proximal` and `reference` of the whole answers, as the advantage ±β σ(-m)
of each token; the loss is then -A_t log π_t, and its tokens may be split between passes as one likes. Scoring happens
before each update, so π_prox is π and the gradient is that of L, not an approximation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.algos.base import Advantages, SampleKey, Unit
from sluice.types import LossInputs, LossOutput, Normaliser, TrainSample


class DPO:
    """Implements `Objective`. A unit is a pair: the samples of the chosen answer's episode, then the others.

    Args:
        beta: see the module.
    """

    requires = frozenset({"proximal", "reference"})
    normaliser = Normaliser.CONSTANT
    constant = 1.0

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def credit(self, units: Sequence[Unit]) -> Advantages:
        """±β σ(-m), times segments of the step over pairs: the normaliser divides by the former, L by the latter."""
        segments = sum(sample.num_trained_tokens > 0 for unit in units for sample in unit)
        slopes = self._beta * np.exp(-np.logaddexp(0.0, self.margins(units))) * segments / max(len(units), 1)
        advantages: dict[SampleKey, NDArray[np.float64]] = {}
        for unit, slope in zip(units, slopes, strict=True):
            for sample in unit:
                advantages[sample.key] = np.where(sample.trained, slope if _chosen(sample, unit) else -slope, 0.0)
        return advantages

    def loss(self, inputs: LossInputs) -> LossOutput:
        return LossOutput(-inputs.streams["advantage"].to(inputs.logprobs.dtype) * inputs.logprobs, {})

    def report(self, units: Sequence[Unit]) -> Mapping[str, float]:
        """Means over pairs: L, the margin m, and how often it is positive (a margin of 0 counts half)."""
        margins = self.margins(units)
        return {
            "loss": float(np.logaddexp(0.0, -margins).mean()),
            "accuracy": float(np.heaviside(margins, 0.5).mean()),
            "margin": float(margins.mean()),
        }

    def margins(self, units: Sequence[Unit]) -> NDArray[np.float64]:
        """m of each pair, `[pairs]`."""
        return np.array(
            [self._beta * sum(_gain(s) if _chosen(s, unit) else -_gain(s) for s in unit) for unit in units],
            dtype=np.float64,
        )


def _chosen(sample: TrainSample, unit: Unit) -> bool:
    return sample.episode_id == unit[0].episode_id


def _gain(sample: TrainSample) -> float:
    """Σ log π - log π_ref over the tokens that are trained."""
    gap = sample["proximal"].astype(np.float64) - sample["reference"].astype(np.float64)
    return float(gap[sample.trained].sum())
