"""What the policy-gradient methods share: returns, the clipped loss, corrections, KL in reward or loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sluice.algos.base import sampled_mask, total_reward
from sluice.algos.corrections import correct
from sluice.algos.kl import kl_estimate
from sluice.algos.overlong import Overlong
from sluice.algos.ratio import LARGEST_LOG_RATIO, ratio_of
from sluice.config.policy_gradient import PolicyGradientConfig
from sluice.types import Group, LossInputs, LossOutput, Normaliser, Scored, TrainSample


class PolicyGradient:
    """Base of the policy-gradient methods: one adds `credit`, and may replace `surrogate`.

    The old policy of the ratio is the behaviour stream. With TIS or IcePop, which weigh by π_prox/μ, it is the
    proximal one: the ratio then measures only how far this batch has moved the policy, and the engine's difference
    (and staleness) is corrected by a factor of its own.

    Args:
        config: the method's choices.
        max_new_tokens: limit of a turn, where a length is not configured.
    """

    def __init__(self, config: PolicyGradientConfig, *, max_new_tokens: int | None = None) -> None:
        self._config = config
        self._kl = config.kl
        self._overlong = Overlong(config.overlong, max_new_tokens=max_new_tokens) if config.overlong else None

    @property
    def requires(self) -> frozenset[str]:
        needed: set[str] = set()
        if self._config.corrects and self._config.proximal == "scored":
            needed.add("proximal")
        if self._kl:
            needed.add("reference")
            if self._kl.where == "reward":
                needed.add("proximal")
        return frozenset(needed)

    @property
    def normaliser(self) -> Normaliser:
        return self._config.normaliser

    @property
    def constant(self) -> float:
        return 1.0

    @property
    def updates_per_batch(self) -> int:
        return self._config.updates_per_batch

    # ── credit ──────────────────────────────────────────────────────────────────────────────────────────

    def token_penalty(self, sample: TrainSample) -> NDArray[np.float64]:
        """KL penalty subtracted from each sampled token's reward, shape `[len(sample)]`; zero without KL."""
        if self._kl is None or self._kl.where != "reward":
            return np.zeros(len(sample))
        proximal = sample["proximal"].astype(np.float64)
        estimate = kl_estimate(self._kl.estimator, proximal, sample["reference"].astype(np.float64))
        return np.where(sampled_mask(sample), self._kl.coefficient * estimate, 0.0)

    def outcome(self, member: Scored) -> float:
        """Total reward of a valid member less the punishment of an overlong one."""
        punishment = self._overlong.punishment(member.episode.num_sampled_tokens) if self._overlong else 0.0
        return total_reward(member) - punishment

    def returns(self, groups: Sequence[Group]) -> list[NDArray[np.float64]]:
        """Outcome of each valid member less its KL penalty, one array `[len(valid)]` per group."""
        return [
            np.array(
                [
                    self.outcome(member) - sum(float(self.token_penalty(s).sum()) for s in member.samples)
                    for member in group.valid
                ],
                dtype=np.float64,
            )
            for group in groups
        ]

    # ── loss ────────────────────────────────────────────────────────────────────────────────────────────

    def loss(self, inputs: LossInputs) -> LossOutput:
        """w · surrogate + β · KL per token; 0 where a correction masks. See `surrogate` and `corrections`."""
        config = self._config
        old = inputs.streams["behaviour"]
        correction = None
        if config.corrects:
            proximal = self.proximal(inputs)
            correction = correct(config, proximal, inputs)
            old = proximal if config.around_proximal else old
        log_ratio = inputs.logprobs - old
        per_token, metrics = self.surrogate(log_ratio, inputs.streams["advantage"].to(log_ratio.dtype), inputs)
        cut = log_ratio.detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        metrics["policy_kl"] = torch.expm1(cut) - cut
        if correction:
            per_token = per_token * correction.weight
            metrics |= correction.metrics
        if self._kl and self._kl.where == "loss":
            penalty = kl_estimate(self._kl.estimator, inputs.logprobs, inputs.streams["reference"])
            per_token = per_token + self._kl.coefficient * penalty
            metrics["reference_kl"] = penalty.detach()
        if correction:
            per_token = torch.where(correction.kept, per_token, 0.0)
        return LossOutput(per_token, metrics)

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """-min(r A, clip(r, 1 - low, 1 + high) A), per token (PPO, arXiv 1707.06347 eq. 7), and metrics.

        Args:
            log_ratio: log π - log π_old, `[tokens]`, with gradient.
            advantage: `[tokens]`.
            inputs: what else a loss sees.
        """
        return clipped(ratio_of(log_ratio), advantage, self._config)

    def proximal(self, inputs: LossInputs) -> Tensor:
        """Log-probs of the proximal policy, `[tokens]`, without gradient; see `PolicyGradientConfig.proximal`."""
        if self._config.proximal == "scored":
            return inputs.streams["proximal"]
        current = inputs.logprobs.detach()
        if self._config.proximal == "current":
            return current
        lag = inputs.streams["lag"].clamp(min=0).to(current.dtype)
        behaviour = inputs.streams["behaviour"]
        return behaviour + lag / (lag + 1) * (current - behaviour)


def clipped(ratio: Tensor, advantage: Tensor, config: PolicyGradientConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate as a loss, and the share of tokens whose gradient it cuts off, `[tokens]` each."""
    cut = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    per_token = -torch.minimum(ratio * advantage, cut * advantage)
    return per_token, {"clip_fraction": (cut * advantage < ratio * advantage).to(ratio.dtype)}
