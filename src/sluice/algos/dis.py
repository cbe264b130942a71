"""DIS, direct double-sided importance sampling (GLM-5, arXiv 2602.15763 §4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from sluice.algos.grpo import GRPO
from sluice.algos.ratio import ratio_of
from sluice.config.algos import DISConfig
from sluice.types import LossInputs


class DIS(GRPO):
    """-f(r) · A · log π per token, r = π/μ; f(r) = r if 1 - low < r < 1 + high, else 0, whatever the sign of A.

    A token with f = 0 has neither loss nor gradient; the normaliser counted it. Advantages are GRPO's.
    """

    def __init__(self, config: DISConfig, *, max_new_tokens: int | None = None) -> None:
        super().__init__(config, max_new_tokens=max_new_tokens)
        self._stop_gradient = config.stop_gradient

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = ratio_of(log_ratio.detach() if self._stop_gradient else log_ratio)
        inside = (ratio > 1 - self._config.clip_low) & (ratio < 1 + self._config.clip_high)
        weight = torch.where(inside, ratio, 0.0)
        metrics = {"dis_masked": (~inside).to(ratio.dtype), "is_weight": weight.detach()}
        return -weight * advantage * inputs.logprobs, metrics
