"""The worked example's episodes, as data. Ids and numbers are those of docs/worked-example.md."""

from __future__ import annotations

import numpy as np

from sluice.types import (
    Author,
    Episode,
    Fork,
    Group,
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

V3, V4, V5 = Version(3), Version(4), Version(5)
PROMPT = Prompt("p7", "calc", (Message("user", "?"),), answer="1")
WEIGHTS = {"answer": 1.0, "format": 0.5}


def sampled(ids: list[int], logprobs: list[float], spans: list[tuple[int, int, Version]], temperature: float) -> Turn:
    return Turn(
        Author.SAMPLED,
        np.array(ids, np.int32),
        logprobs=np.array(logprobs, np.float32),
        spans=tuple(VersionSpan(*span) for span in spans),
        sampling=SamplingParams(temperature=temperature),
        finish="stop",
    )


def request() -> GroupRequest:
    return GroupRequest(0, PROMPT, 3, SamplingParams(temperature=0.8))


def episodes() -> tuple[Episode, Episode, Episode]:
    group = request().id
    s0 = Segment(
        (
            observed([1, 10, 11, 12]),
            sampled([20, 21, 22, 2], [-0.5, -1.0, -0.25, -0.125], [(0, 2, V3), (2, 4, V4)], 0.8),
            observed([30, 31]),
            sampled([23, 2], [-0.75, -0.0625], [(0, 2, V4)], 0.8),
        )
    )
    s1 = Segment(
        (observed([40, 41]), sampled([24, 25, 2], [-1.5, -0.5, -0.25], [(0, 3, V4)], 0.8)),
        Fork(0, 8, "sub_agent"),
    )
    e1 = Episode("g000000.0", group, PROMPT, (s0, s1), Outcome.COMPLETED)
    turn = sampled([26, 27, 2], [-0.3, -0.2, -0.1], [(0, 3, V5)], 0.8)
    e2 = Episode("g000000.1", group, PROMPT, (Segment((observed([1, 10, 11, 12]), turn)),), Outcome.COMPLETED)
    cut = Segment((observed([1, 10, 11, 12]), sampled([28, 2], [-0.1, -0.1], [(0, 2, V5)], 0.8)))
    e3 = Episode("g000000.2", group, PROMPT, (cut,), Outcome.INFRA_FAILURE, reason="sandbox died")
    return e1, e2, e3


def rewards() -> tuple[Reward, Reward]:
    return (
        Reward({"answer": 1.0, "format": 0.0}, WEIGHTS),
        Reward({"answer": 0.0, "format": 0.0}, WEIGHTS),
    )


def group() -> Group:
    e1, e2, e3 = episodes()
    r1, r2 = rewards()
    return Group(request(), (Scored(e1, r1, expand(e1)), Scored(e2, r2, expand(e2)), Scored(e3, None)))
