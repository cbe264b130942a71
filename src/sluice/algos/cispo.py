"""CISPO: the clipped ratio weighs, and no token loses its gradient (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

from torch import Tensor

from sluice.algos.grpo import GRPO
from sluice.algos.ratio import ratio_of
from sluice.types import LossInputs


class CISPO(GRPO):
    """-sg(clip(r, 1 - low, 1 + high)) · A · log π per token; advantages are GRPO's."""

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = ratio_of(log_ratio.detach())
        weight = ratio.clamp(1 - self._config.clip_low, 1 + self._config.clip_high)
        metrics = {"clip_fraction": (weight != ratio).to(ratio.dtype), "is_weight": weight}
        return -weight * advantage * inputs.logprobs, metrics
