"""Dr. GRPO: neither the group's deviation nor the answer's length weighs in (arXiv 2503.20783)."""

from __future__ import annotations

from collections.abc import Sequence

from sluice.algos.base import Advantages, per_episode
from sluice.algos.grpo import centre
from sluice.algos.policy import PolicyGradient
from sluice.config.algos import DrGRPOConfig
from sluice.errors import ConfigError
from sluice.types import Group


class DrGRPO(PolicyGradient):
    """A = R - mean of the group; the loss is divided by a constant length."""

    def __init__(self, config: DrGRPOConfig, *, max_new_tokens: int | None = None) -> None:
        super().__init__(config, max_new_tokens=max_new_tokens)
        constant = config.constant or max_new_tokens
        if constant is None:
            raise ConfigError("Dr. GRPO divides by a constant length, and none is known", hint="set algorithm.constant")
        self._constant = float(constant)

    @property
    def constant(self) -> float:
        return self._constant

    def credit(self, groups: Sequence[Group]) -> Advantages:
        return per_episode(groups, [centre(returns) for returns in self.returns(groups)])
