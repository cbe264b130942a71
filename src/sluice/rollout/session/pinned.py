"""The sampling parameters of a session: its own, whatever a client asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from sluice.rollout.gateway.errors import ContextOverflow, SamplingPinned
from sluice.types import SamplingParams

_NAMES = ("temperature", "top_p", "top_k", "min_p")
_NEUTRAL = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
"""Values that ask for nothing, of parameters that a session does not have."""


class Pinned:
    """Grants what is the session's own anyway, and refuses or notes everything else.

    Attributes:
        flagged: requests that asked for something else and were answered without it.
        wishes: what they asked for, each once.
    """

    def __init__(self, sampling: SamplingParams, mode: Literal["refuse", "flag"]) -> None:
        self._own = sampling
        self._mode = mode
        self.flagged = 0
        self.wishes: list[dict[str, float]] = []

    def check(self, wishes: Mapping[str, float]) -> None:
        """Raises SamplingPinned for another value than the session's, unless such wishes are only noted."""
        asked = {name: value for name, value in wishes.items() if not self._granted(name, value)}
        if not asked:
            return
        if self._mode == "refuse":
            told = ", ".join(f"{name} = {value}" for name, value in asked.items())
            own = ", ".join(f"{name} = {getattr(self._own, name)}" for name in _NAMES)
            raise SamplingPinned(
                f"this session samples with its own parameters, not with {told}",
                hint=f"leave them out; the session has {own}",
            )
        self.flagged += 1
        if asked not in self.wishes:
            self.wishes.append(asked)

    def limited(self, used: int, limit: int, wanted: int | None, stop: tuple[str, ...]) -> SamplingParams:
        """For one answer behind `used` tokens in a context of `limit`.

        Raises:
            ContextOverflow: there is no room for a token.
        """
        if used >= limit:
            raise ContextOverflow(
                f"This model's maximum context length is {limit} tokens. However, your messages resulted in "
                f"{used} tokens, which leaves no room for an answer.",
                hint="shorten the messages",
            )
        own = self._own.max_new_tokens
        most = min(own, limit - used, own if wanted is None else wanted)
        strings = tuple(dict.fromkeys((*self._own.stop, *filter(None, stop))))
        return replace(self._own, max_new_tokens=most, stop=strings)

    def _granted(self, name: str, value: float) -> bool:
        if name == "top_k":
            return value == self._own.top_k or (value <= 0 and self._own.top_k <= 0)
        if name in _NAMES:
            return math.isclose(value, getattr(self._own, name), rel_tol=1e-6, abs_tol=1e-9)
        return name in _NEUTRAL and value == _NEUTRAL[name]
