"""PPO with a critic (arXiv 1707.06347), advantages by GAE over an episode's sampled tokens.

Rewards: the episode's outcome at its last sampled token; at every one of them, with KL in the reward, less the
penalty. A truncated episode ends as a completed one does: the token limit is part of the task, so its reward
is final and no value is bootstrapped for what was never written. Segments follow each other in the order of
the episode, so what an earlier segment did is discounted by (γλ)^(sampled tokens between).

`value` is V before each token under the critic at the start of the batch. The critic learns
`return` = value + advantage at `value_lambda`, a fixed target for all updates on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.algos.base import Advantages, SampleKey, sampled_mask, samples_of
from sluice.algos.gae import gae, length_adaptive
from sluice.algos.policy import PolicyGradient
from sluice.algos.reinforce_pp import normalise
from sluice.config.critic import CriticConfig, PPOConfig
from sluice.types import Group, LossOutput, Scored, ValueInputs


class PPO(PolicyGradient):
    """See the module. Implements `ActorCritic`."""

    def __init__(self, config: PPOConfig, *, max_new_tokens: int | None = None) -> None:
        super().__init__(config, max_new_tokens=max_new_tokens)
        self._ppo = config

    @property
    def requires(self) -> frozenset[str]:
        return super().requires | {"value"}

    @property
    def critic(self) -> CriticConfig:
        return self._ppo.critic

    def credit(self, groups: Sequence[Group]) -> Advantages:
        members = [member for group in groups for member in group.valid]
        raw = _spread(members, [self._advantages(member, self._decay(member)) for member in members])
        if not self._ppo.normalise:
            return raw
        return normalise(raw, {s.key: sampled_mask(s) for s in samples_of(groups)}, self._ppo.eps)

    def targets(self, groups: Sequence[Group]) -> Advantages:
        members = [member for group in groups for member in group.valid]
        returns: list[NDArray[np.float64]] = []
        for member in members:
            decay = self._decay(member) if self._ppo.value_lambda is None else self._ppo.value_lambda
            returns.append(_sampled(member, "value") + self._advantages(member, decay))
        return _spread(members, returns)

    def value_loss(self, inputs: ValueInputs) -> LossOutput:
        """½ max((V - R)², (V_clipped - R)²), V_clipped within `value_clip` of the value at the start of the batch."""
        target = inputs.streams["return"].to(inputs.values.dtype)
        old = inputs.streams["value"].to(inputs.values.dtype)
        error = (inputs.values - target) ** 2
        clip = self.critic.value_clip
        if not clip:
            return LossOutput(0.5 * error, {})
        clipped = (old + (inputs.values - old).clamp(-clip, clip) - target) ** 2
        return LossOutput(
            0.5 * torch.maximum(error, clipped), {"clip_fraction": (clipped > error).to(inputs.values.dtype)}
        )

    def _decay(self, member: Scored) -> float:
        """λ of the advantages of one episode."""
        if self._ppo.length_adaptive is None:
            return self._ppo.gae_lambda
        return length_adaptive(self._ppo.length_adaptive, member.episode.num_sampled_tokens)

    def _advantages(self, member: Scored, decay: float) -> NDArray[np.float64]:
        """GAE over the sampled tokens of an episode, `[sampled tokens]`."""
        penalties = [self.token_penalty(sample)[sampled_mask(sample)] for sample in member.samples]
        rewards = -np.concatenate([np.zeros(0), *penalties])
        if len(rewards):
            rewards[-1] += self.outcome(member)
        return gae(rewards, _sampled(member, "value"), gamma=self._ppo.gamma, decay=decay)


def _sampled(member: Scored, stream: str) -> NDArray[np.float64]:
    """A stream at the episode's sampled tokens, one after the other."""
    parts = [sample[stream][sampled_mask(sample)].astype(np.float64) for sample in member.samples]
    return np.concatenate([np.zeros(0), *parts])


def _spread(members: Sequence[Scored], values: Sequence[NDArray[np.float64]]) -> dict[SampleKey, NDArray[np.float64]]:
    """Values of each member's sampled tokens, put where its samples have them; 0 elsewhere."""
    spread: dict[SampleKey, NDArray[np.float64]] = {}
    for member, own in zip(members, values, strict=True):
        at = 0
        for sample in member.samples:
            mask = sampled_mask(sample)
            count = int(mask.sum())
            spread[sample.key] = np.zeros(len(sample))
            spread[sample.key][mask] = own[at : at + count]
            at += count
    return spread
