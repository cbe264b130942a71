"""What the policy-gradient methods share: the clipped loss, TIS, and KL in reward or loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sluice.algos.base import sampled_mask, total_reward
from sluice.algos.kl import kl_estimate
from sluice.config.algos import PolicyGradientConfig
from sluice.types import Group, LossInputs, LossOutput, TrainSample


class PolicyGradient:
    """Base of the policy-gradient methods; a method adds `credit`, `normaliser` and `constant`.

    The old policy of the ratio is the behaviour stream. With TIS it is the proximal one: the ratio then
    measures only how far this batch has moved the policy, and the engine's difference (and staleness) is
    corrected by a factor of its own.
    """

    def __init__(self, config: PolicyGradientConfig) -> None:
        self._config = config
        self._kl = config.kl
        self._old = "proximal" if config.tis else "behaviour"

    @property
    def requires(self) -> frozenset[str]:
        needed: set[str] = set()
        if self._config.tis:
            needed.add("proximal")
        if self._kl:
            needed.add("reference")
            if self._kl.where == "reward":
                needed.add("proximal")
        return frozenset(needed)

    @property
    def updates_per_batch(self) -> int:
        return self._config.updates_per_batch

    @property
    def constant(self) -> float:
        return 1.0

    def token_penalty(self, sample: TrainSample) -> NDArray[np.float64]:
        """KL penalty subtracted from each sampled token's reward, shape `[len(sample)]`; zero without KL."""
        if self._kl is None or self._kl.where != "reward":
            return np.zeros(len(sample))
        proximal = sample["proximal"].astype(np.float64)
        estimate = kl_estimate(self._kl.estimator, proximal, sample["reference"].astype(np.float64))
        return np.where(sampled_mask(sample), self._kl.coefficient * estimate, 0.0)

    def returns(self, groups: Sequence[Group]) -> list[NDArray[np.float64]]:
        """Total reward of each valid member less its KL penalty, one array `[len(valid)]` per group."""
        return [
            np.array(
                [
                    total_reward(member) - sum(float(self.token_penalty(s).sum()) for s in member.samples)
                    for member in group.valid
                ],
                dtype=np.float64,
            )
            for group in groups
        ]

    def loss(self, inputs: LossInputs) -> LossOutput:
        """-w · min(r A, clip(r, 1 - low, 1 + high) A) + β · KL, per token (PPO, arXiv 1707.06347 eq. 7).

        r = π/π_old; w = min(π_prox/μ, cap) with TIS, else 1.
        """
        config = self._config
        advantage = inputs.streams["advantage"].to(inputs.logprobs.dtype)
        log_ratio = inputs.logprobs - inputs.streams[self._old]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        per_token = -torch.minimum(ratio * advantage, clipped * advantage)
        metrics: dict[str, Tensor] = {
            "clip_fraction": (clipped * advantage < ratio * advantage).to(ratio.dtype),
            "policy_kl": torch.expm1(log_ratio) - log_ratio,
        }
        if config.tis:
            weight = tis_weight(inputs.streams["proximal"], inputs.streams["behaviour"], config.tis.cap)
            per_token = per_token * weight
            metrics["tis_weight"] = weight
        if self._kl and self._kl.where == "loss":
            penalty = kl_estimate(self._kl.estimator, inputs.logprobs, inputs.streams["reference"])
            per_token = per_token + self._kl.coefficient * penalty
            metrics["reference_kl"] = penalty.detach()
        return LossOutput(per_token, metrics)


def tis_weight(proximal: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """min(π_prox / μ, cap) per token, without gradient."""
    return (proximal - behaviour).exp().clamp(max=cap).detach()
