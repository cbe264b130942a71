"""On-policy distillation: the policy's own tokens, judged by a teacher's log-probs.

    A_t = coefficient · (log π_teacher(a_t | s_t) - log π_prox(a_t | s_t))        at every sampled token

There are no group statistics. A token is judged by itself alone: what it leads to is not credited. With
a_t ~ π, E[A_t ∇ log π(a_t)] = -coefficient · ∇ KL(π(· | s_t) || π_teacher(· | s_t)): each step descends the
reverse KL at the states that the policy visits (as slime and tinker-cookbook do it). Both log-probs are at
the temperature the token was sampled at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.algos.base import Advantages, per_episode, sampled_mask, samples_of
from sluice.algos.policy import PolicyGradient
from sluice.algos.rloo import leave_one_out
from sluice.config.distillation import OPDConfig
from sluice.types import Group, LossInputs, LossOutput, TrainSample


class OPD(PolicyGradient):
    """See the module; optionally the reward's advantage is added."""

    def __init__(self, config: OPDConfig, *, max_new_tokens: int | None = None) -> None:
        super().__init__(config, max_new_tokens=max_new_tokens)
        self._teacher = f"teacher:{config.teacher}"
        self._coefficient = config.coefficient
        self._reward_coefficient = config.reward_coefficient

    @property
    def requires(self) -> frozenset[str]:
        return super().requires | {"proximal", self._teacher}

    def credit(self, groups: Sequence[Group]) -> Advantages:
        scale = self._reward_coefficient
        rewarded = per_episode(groups, [scale * leave_one_out(returns) for returns in self.returns(groups)])
        return {sample.key: self._distance(sample) + rewarded[sample.key] for sample in samples_of(groups)}

    def _distance(self, sample: TrainSample) -> NDArray[np.float64]:
        """coefficient · (log teacher - log proximal) at sampled tokens, shape `[len(sample)]`."""
        gap = sample[self._teacher].astype(np.float64) - sample["proximal"].astype(np.float64)
        return np.where(sampled_mask(sample), self._coefficient * gap, 0.0)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """That of the policy gradient; `teacher_kl` is the k1 estimate of KL(policy || teacher) in nats a token."""
        output = super().loss(inputs)
        distance = inputs.logprobs.detach() - inputs.streams[self._teacher]
        return LossOutput(output.per_token, {**output.metrics, "teacher_kl": distance})
