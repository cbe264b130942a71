"""What a runner is asked for, and what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from sluice.rollout.engines.base import Generation
from sluice.types import Author, Episode, GroupRequest, Prompt, SamplingParams, Turn


def noise_key(seed: int, *parts: str | int) -> int:
    """64-bit key of the sampling noise of one turn: a hash of the run's seed and what names the turn."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, (seed, *parts))).encode())


class Receipt:
    """What becomes of a training episode after its runner has handed it over: whether it is in the durable log."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self._logged = False

    def settle(self, *, logged: bool) -> None:
        """Say so. What is said first stands."""
        self._logged = self._logged if self._over.is_set() else logged
        self._over.set()

    async def logged(self, seconds: float) -> bool:
        """Wait until it is known; False when that takes longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            return False
        return self._logged


@dataclass(frozen=True, slots=True)
class EpisodeRequest:
    """One episode to be executed.

    Attributes:
        id, group_id: of the episode to come.
        prompt: what it is about.
        sampling: in force for every turn.
        noise: the key of a turn's sampling noise by the turn's name; the only turn of a single-turn episode is
            called by the empty string.
        measured: the episode belongs to an evaluation.
        receipt: for runners that have somebody to tell; settled for episodes that are trained.
    """

    id: str
    group_id: str
    prompt: Prompt
    sampling: SamplingParams
    noise: Callable[[str], int]
    measured: bool = False
    receipt: Receipt = field(default_factory=Receipt, compare=False)

    @classmethod
    def member(cls, group: GroupRequest, sample: int, *, seed: int) -> EpisodeRequest:
        """Episode `sample` of a group."""
        parts = (seed, group.prompt.id, group.ordinal, sample)
        return cls(group.episode_id(sample), group.id, group.prompt, group.sampling, turn_noise(*parts))


def turn_noise(seed: int, *parts: str | int) -> Callable[[str], int]:
    """`noise_key` of an episode's turns: what names the episode, then the turn's name unless that is empty."""
    return lambda turn: noise_key(seed, *parts, turn) if turn else noise_key(seed, *parts)


class Runner(Protocol):
    """Executes episodes, many at once."""

    def admit(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raise DataError when the prompt cannot be asked: it fills the context. Called before anything is trained."""
        ...

    async def run(self, request: EpisodeRequest) -> Episode:
        """The finished episode. Raises EngineError when the engine is gone; any other end is an Outcome."""
        ...


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
        routes=generation.routes,
    )
