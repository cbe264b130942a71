"""GSPO: one ratio for a whole sequence (arXiv 2507.18071)."""

from __future__ import annotations

from torch import Tensor

from sluice.algos.grpo import GRPO
from sluice.algos.policy import clipped
from sluice.algos.ratio import ratio_of, segment_mean
from sluice.types import LossInputs


class GSPO(GRPO):
    """s = exp(mean_t log r_t), clipped like PPO's ratio; advantages are GRPO's.

    A sequence is a segment: all turns that one forward pass sees, and only their trained tokens. Episodes of several
    segments have a ratio for each. The form is the paper's GSPO-token (eq. 13): every token's loss holds s as a value
    and its own log-prob as the gradient. With one advantage a segment, loss and gradient are those of eq. 5; and a
    token that is masked is out of the gradient altogether.
    """

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        value = ratio_of(segment_mean(log_ratio.detach(), inputs))
        own = (log_ratio - log_ratio.detach()).exp()  # 1, with the gradient of the token's log-prob
        return clipped(value * own, advantage, self._config)
