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
    return finished(request, sample, (VersionSpan(0, 2, Version(version)),), reward)


def finished(request: GroupRequest, sample: int, spans: tuple[VersionSpan, ...], reward: float) -> Scored:
    """A finished episode of one turn, whose tokens these versions drew."""
    n = spans[-1].end
    turn = Turn(Author.SAMPLED, np.arange(5, 5 + n, dtype=np.int32), np.zeros(n, np.float32), spans, SAMPLING)
    segment = Segment((observed([1]), turn))
    episode = Episode(request.episode_id(sample), request.id, request.prompt, (segment,), Outcome.COMPLETED)
    return Scored(episode, Reward({"r": reward}, {"r": 1.0}), expand(episode))
