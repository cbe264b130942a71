"""Soft punishment of overlong answers (DAPO, arXiv 2503.14476 eq. 13).

It belongs to credit, not to the rewards: what an episode is worth stays what its verifiers say, in the log, in
evaluation and for the group filters. A group of wrong answers of several lengths is still all wrong to dynamic
sampling.
"""

from __future__ import annotations

from sluice.config.policy_gradient import OverlongConfig
from sluice.errors import ConfigError


class Overlong:
    """0 up to `max_tokens - buffer`, linear up to `weight` at `max_tokens`, `weight` beyond."""

    def __init__(self, config: OverlongConfig, *, max_new_tokens: int | None) -> None:
        limit = config.max_tokens or max_new_tokens
        if limit is None:
            raise ConfigError(
                "overlong answers have no limit to be measured by", hint="set algorithm.overlong.max_tokens"
            )
        self._limit = limit
        self._buffer = config.buffer or max(1, limit // 5)
        self._weight = config.weight
        if self._buffer > limit:
            raise ConfigError(
                f"algorithm.overlong.buffer = {self._buffer} is longer than the {limit} tokens of a whole episode",
                hint="set a smaller buffer",
            )

    def punishment(self, num_tokens: int) -> float:
        """What an episode of `num_tokens` sampled tokens loses, never negative."""
        over = num_tokens - (self._limit - self._buffer)
        return self._weight * min(max(over / self._buffer, 0.0), 1.0)
