"""REINFORCE++ and its baseline variant: advantages normalised over the whole batch (arXiv 2501.03262)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.algos.base import Advantages, SampleKey, sampled_mask
from sluice.algos.grpo import centre
from sluice.algos.policy import PolicyGradient
from sluice.config.algos import ReinforcePPBaselineConfig, ReinforcePPConfig
from sluice.types import Group


class ReinforcePP(PolicyGradient):
    """A_t = R - Σ_{i≥t} penalty_i, then (A - mean) / (std + eps) over all sampled tokens of the batch.

    The sum runs inside a segment; segments of one episode share its outcome.
    """

    def __init__(
        self, config: ReinforcePPConfig | ReinforcePPBaselineConfig, *, max_new_tokens: int | None = None
    ) -> None:
        super().__init__(config, max_new_tokens=max_new_tokens)
        self._eps = config.eps

    def credit(self, groups: Sequence[Group]) -> Advantages:
        raw: dict[SampleKey, NDArray[np.float64]] = {}
        masks: dict[SampleKey, NDArray[np.bool_]] = {}
        for group in groups:
            for member, outcome in zip(group.valid, self.outcomes(group), strict=True):
                for sample in member.samples:
                    to_go = np.cumsum(self.token_penalty(sample)[::-1])[::-1]
                    raw[sample.key] = float(outcome) - to_go
                    masks[sample.key] = sampled_mask(sample)
        return normalise(raw, masks, self._eps)

    def outcomes(self, group: Group) -> NDArray[np.float64]:
        """What each valid member is worth before penalties, shape `[len(valid)]`."""
        return np.array([self.outcome(member) for member in group.valid], dtype=np.float64)


class ReinforcePPBaseline(ReinforcePP):
    """REINFORCE++ with R - mean of the group's valid members in place of R."""

    def outcomes(self, group: Group) -> NDArray[np.float64]:
        return centre(super().outcomes(group))


def normalise(
    raw: Mapping[SampleKey, NDArray[np.float64]], masks: Mapping[SampleKey, NDArray[np.bool_]], eps: float
) -> Advantages:
    """(x - mean) / (std + eps) over the masked tokens of all samples, 0 elsewhere; 0 everywhere if all are equal."""
    if not raw:
        return {}
    values = np.concatenate([raw[key][masks[key]] for key in raw])
    if len(values) == 0 or np.all(values == values[0]):
        return {key: np.zeros_like(tokens) for key, tokens in raw.items()}
    mean, std = values.mean(), values.std()
    return {key: np.where(masks[key], (tokens - mean) / (std + eps), 0.0) for key, tokens in raw.items()}
