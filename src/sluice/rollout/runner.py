"""Runners: one episode of one prompt. The single-turn runner asks once and records what came back."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import xxhash

from sluice.errors import DataError
from sluice.rollout.engines.base import Engine, Finish, GenerateRequest, Generation
from sluice.rollout.render import Renderer
from sluice.types import (
    Author,
    Episode,
    GroupRequest,
    Ids,
    Outcome,
    Prompt,
    SamplingParams,
    Segment,
    Turn,
    observed,
)


class Runner(Protocol):
    """Executes one prompt. Raises EngineError when the engine is gone; any other end is an Outcome."""

    async def run(self, request: GroupRequest, sample: int) -> Episode: ...


def noise_key(seed: int, *parts: str | int) -> int:
    """64-bit key of the sampling noise of one turn: a hash of the run's seed and what names the turn."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, (seed, *parts))).encode())


class SingleTurn:
    """One question, one answer.

    Args:
        engine: serves the policy.
        renderer: its chat template.
        seed: of the run; with prompt, group and sample it keys the sampling noise.
        context_length: longest prompt plus answer, in tokens.
    """

    def __init__(self, engine: Engine, renderer: Renderer, *, seed: int, context_length: int) -> None:
        self._engine = engine
        self._renderer = renderer
        self._seed = seed
        self._context_length = context_length

    def admit(self, prompt: Prompt, max_new_tokens: int) -> Ids:
        """The prompt's ids, if an answer fits behind them.

        Raises:
            DataError: the prompt alone fills the context.
        """
        ids = self._renderer.prompt_ids(prompt)
        if len(ids) >= self._context_length:
            raise DataError(
                f"prompt {prompt.id} has {len(ids)} tokens; the context holds {self._context_length} "
                f"with the answer (up to {max_new_tokens} tokens)",
                hint="shorten or drop it, or raise rollout.context_length if the model and engine allow it",
            )
        return ids

    async def run(self, request: GroupRequest, sample: int) -> Episode:
        """Sample `sample` of the group."""
        id = request.episode_id(sample)
        key = noise_key(self._seed, request.prompt.id, request.ordinal, sample)
        return await self.answer(id, request.id, request.prompt, request.sampling, key)

    async def answer(self, id: str, group_id: str, prompt: Prompt, sampling: SamplingParams, key: int) -> Episode:
        """Ask the engine once. The answer's limit is what the context leaves, if that is less."""
        ids = self.admit(prompt, sampling.max_new_tokens)
        room = self._context_length - len(ids)
        limited = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        generation = await self._engine.generate(GenerateRequest(id, ids, limited, key))
        turns = (observed(ids), sampled_turn(generation, limited))
        outcome = {
            Finish.STOP: Outcome.COMPLETED,
            Finish.LENGTH: Outcome.TRUNCATED,
            Finish.ABORT: Outcome.ABORTED,
        }[generation.finish]
        return Episode(id, group_id, prompt, (Segment(turns),), outcome)


def sampled_turn(generation: Generation, sampling: SamplingParams) -> Turn:
    """What the engine drew, as a turn."""
    return Turn(
        Author.SAMPLED,
        generation.ids,
        logprobs=generation.logprobs,
        spans=generation.spans,
        sampling=sampling,
        finish=generation.finish.value,
        sampled_logprobs=generation.sampled_logprobs,
    )
