"""A seeded coin: the control that shows what training does without a signal."""

from __future__ import annotations

import xxhash

from sluice.config.rewards import RandomReward
from sluice.rewards.base import Submission
from sluice.types import Prompt


class RandomVerifier:
    """0 or 1 by the episode's id and the seed alone, so that a resumed run draws the same."""

    def __init__(self, config: RandomReward) -> None:
        self._probability = config.probability
        self._seed = config.seed

    def check(self, prompt: Prompt) -> None:
        """Any prompt will do."""

    async def score(self, submission: Submission) -> float:
        """The draw of this episode."""
        draw = xxhash.xxh3_64_intdigest(f"{self._seed}/{submission.episode_id}".encode()) / 2**64
        return float(draw < self._probability)
