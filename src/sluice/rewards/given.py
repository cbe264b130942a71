"""A component that somebody else measured: the owner of a session, or a recipe's verify program."""

from __future__ import annotations

from typing import Any

from sluice.config.rewards import GivenReward
from sluice.errors import RewardError
from sluice.rewards.base import Submission
from sluice.types import Prompt

KEY = "rewards"
"""Key of `Episode.info` that holds what was given: component name → number."""
WHY = "rewards_missing"
"""Key of `Episode.info` that says why nothing was given, where somebody should have."""


class GivenVerifier:
    """Passes on what the episode brought with it."""

    def __init__(self, config: GivenReward) -> None:
        self._component = config.component
        self._default = config.default

    def check(self, prompt: Prompt) -> None:
        """Any prompt will do."""

    async def score(self, submission: Submission) -> Any:
        """The component in `Episode.info`, whatever it is; the default when nobody gave it.

        Raises:
            RewardError: nobody gave it, and there is no default.
        """
        info = submission.info
        given = info.get(KEY, {})
        if self._component in given:
            return given[self._component]
        if self._default is not None and WHY not in info:
            return self._default
        why = info.get(WHY) or (f"given were {', '.join(sorted(given))}" if given else "nothing was given")
        raise RewardError(f"nobody gave {self._component!r}: {why}")
