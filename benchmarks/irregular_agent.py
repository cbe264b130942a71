"""An agent whose answers and tools take as long as a seeded draw says: what `benchmarks.irregular` samples with."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from math import log

import numpy as np
import xxhash

from sluice.rollout.engines.base import GenerateRequest
from sluice.rollout.runners.base import EpisodeRequest, sampled_turn
from sluice.rollout.runners.toolkit import Toolkit
from sluice.types import Episode, Outcome, Prompt, Segment, Turn, observed

NORMAL_P99 = 2.3263
"""Standard normal quantile of 0.99."""
TOOL_TOKENS = 8
"""Of what a tool says."""


def lognormal(chance: np.random.Generator, median: float, tail: float) -> float:
    """A draw whose p99 is `tail` times its median; the median itself at a tail of 1."""
    return median * float(np.exp(log(tail) / NORMAL_P99 * chance.standard_normal()))


class Irregular:
    """`turns` answers with a tool between two of them. A model of random weights says when to stop to nobody here.

    Args:
        kit: of the run.
        median, tail, limit: tokens of an answer, its p99 over its median, its most.
        turns: answers of an episode.
        context: tokens of the prompt, which is repeated until it has them.
        tool_seconds, tool_limit: median and most of a tool's time; the same tail. 0: no tool takes time.
    """

    def __init__(
        self,
        kit: Toolkit,
        *,
        median: int,
        tail: float,
        limit: int,
        turns: int,
        context: int,
        tool_seconds: float,
        tool_limit: float,
    ) -> None:
        self._kit = kit
        self._median, self._tail, self._limit, self._turns = median, tail, limit, turns
        self._context = context
        self._tool_seconds, self._tool_limit = tool_seconds, tool_limit

    def admit(self, prompt: Prompt, max_new_tokens: int) -> None:
        self._kit.admit(prompt, max_new_tokens)

    async def run(self, request: EpisodeRequest) -> Episode:
        chance = np.random.default_rng(xxhash.xxh64_intdigest(request.id.encode()))
        asked = np.asarray(self._kit.chat.prompt_ids(request.prompt), np.int32)
        context = np.resize(asked, max(self._context, len(asked)))
        turns: list[Turn] = [observed(context)]
        try:
            for number in range(self._turns):
                if number:
                    said = asked[:TOOL_TOKENS]
                    await asyncio.sleep(min(self._draw(chance, self._tool_seconds), self._tool_limit))
                    context = np.concatenate([context, said])
                    turns.append(observed(said))
                size = round(min(max(self._draw(chance, self._median), 1), self._limit))
                sampling = replace(request.sampling, max_new_tokens=size, stop_token_ids=())
                answer = await self._kit.engine.generate(
                    GenerateRequest(
                        f"{request.id}.{number}", context, sampling, request.noise(str(number)), routing_key=request.id
                    )
                )
                context = np.concatenate([context, answer.ids])
                turns.append(sampled_turn(answer, sampling))
        finally:
            await self._kit.engine.release(request.id)
        return Episode(request.id, request.group_id, request.prompt, (Segment(tuple(turns)),), Outcome.COMPLETED)

    def _draw(self, chance: np.random.Generator, median: float) -> float:
        return lognormal(chance, median, self._tail) if median else 0.0
