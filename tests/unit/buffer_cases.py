"""Prompts and finished episodes for a buffer, without an engine."""

from __future__ import annotations

import numpy as np

from sluice.types import (
    Author,
    Episode,
    GroupRequest,
    Message,
    Outcome,
    Prompt,
    Reward,
    SamplingParams,
    Scored,
    Segment,
    Turn,
    Version,
    VersionSpan,
    expand,
    observed,
)

SAMPLING = SamplingParams()


def prompts(n: int, prefix: str = "p") -> list[Prompt]:
    return [Prompt(f"{prefix}{i}", "t", (Message("user", str(i)),)) for i in range(n)]


def scored(request: GroupRequest, sample: int, version: int = 0, reward: float | None = None) -> Scored:
    """A finished episode; by default half of the groups have equal rewards."""
    if reward is None:
        reward = float((sample + request.ordinal) % 2) if request.ordinal % 2 else 1.0
    turn = Turn(
        Author.SAMPLED,
        np.array([5, 6], np.int32),
        logprobs=np.zeros(2, np.float32),
        spans=(VersionSpan(0, 2, Version(version)),),
        sampling=SAMPLING,
    )
    segment = Segment((observed([1]), turn))
    episode = Episode(request.episode_id(sample), request.id, request.prompt, (segment,), Outcome.COMPLETED)
    return Scored(episode, Reward({"r": reward}, {"r": 1.0}), expand(episode))
