"""An engine that remembers what it was asked in episodes that are under way, also those of a process that is gone.

    ask for turn k+1 ─► turn k is kept ─► the same was asked before? ─► yes: its turn, as it was drawn
                                                                     └► no, or too old: the engine draws

A turn is kept when the next one of its episode is asked for: the last one is in the log with its episode anyway, and
an episode of one turn costs nothing. A tool may take longer than the turn that called it, so one that has waited for
`HELD_SECONDS` is kept with the next request of any episode, and all are at the end of the run.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from sluice.log.records import TurnRecord
from sluice.rollout.engines.base import Capabilities, Engine, Finish, GenerateRequest, Generation, PauseMode
from sluice.types import Author, Turn, Version

HELD_SECONDS = 1.0


class Turns(Protocol):
    """Where turns of unfinished episodes are kept."""

    async def keep(self, records: Sequence[TurnRecord]) -> None:
        """Durable when it returns. Raises LogError."""
        ...

    def take(self, episode_id: str) -> dict[str, TurnRecord]:
        """What an earlier process has kept of an episode, by `asked`; nothing when it is called again."""
        ...

    def may_use(self, record: TurnRecord, /) -> bool:
        """Whether the versions that drew it are young enough now."""
        ...

    def over(self, episode_id: str) -> None:
        """The episode is in the log; its turns need not be kept."""
        ...

    @property
    def bound(self) -> int | None:
        """Of the records that are made; see `TurnRecord`."""
        ...


@dataclass(slots=True)
class _Held:
    """Turns of one episode that are not kept yet, since `began` (monotonic seconds)."""

    began: float
    records: list[TurnRecord] = field(default_factory=list[TurnRecord])


class Continuing:
    """An `Engine` around another one. Requests are told apart by `routing_key`, which is the episode's id.

    Args:
        engine: draws what was not drawn before.
        turns: see `Turns`.
    """

    def __init__(self, engine: Engine, turns: Turns) -> None:
        self._engine, self._turns = engine, turns
        self._found: dict[str, dict[str, TurnRecord]] = {}  # of the episodes under way
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._reused = [0, 0]  # turns, tokens

    # Episodes.

    def begin(self, episode_id: str) -> None:
        """An attempt at an episode begins: its turns are kept from here on, and those of an earlier process answer.
        What a failed attempt of this process has drawn does not: it may be what failed."""
        self._held.pop(episode_id, None)
        self._found[episode_id] = self._turns.take(episode_id)

    def end(self, episode_id: str) -> None:
        """The episode is in the log."""
        self._held.pop(episode_id, None)
        self._found.pop(episode_id, None)
        self._turns.over(episode_id)

    async def keep(self) -> None:
        """Keep every turn that was drawn, because the run stops. Raises LogError."""
        held, self._held = self._held, OrderedDict()
        await self._keep([record for each in held.values() for record in each.records])

    def figures(self) -> dict[str, float]:
        """For the metrics of a batch: what was answered from records since they were asked for."""
        turns, tokens = self._reused
        self._reused = [0, 0]
        return {"session/reused_turns": float(turns), "session/reused_tokens": float(tokens)}

    # The engine.

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def version(self) -> Version | None:
        return self._engine.version

    async def start(self) -> Capabilities:
        return await self._engine.start()

    async def generate(self, request: GenerateRequest) -> Generation:
        """What was drawn for the same request before, or what the engine draws.

        Raises:
            EngineError: the engine's.
            LogError: turns cannot be kept.
        """
        id = request.routing_key
        found = self._found.get(id)
        if found is None:
            return await self._engine.generate(request)
        await self._keep(self._due(id))
        asked = digest(request)
        record = found.pop(asked, None)
        if record is not None and self._turns.may_use(record):
            await asyncio.sleep(0)
            self._reused[0] += 1
            self._reused[1] += len(record.turn)
            if request.on_tokens is not None:
                request.on_tokens(record.turn.ids.tolist())
            return generation(record.turn)
        drawn = await self._engine.generate(request)
        if drawn.finish is not Finish.ABORT and self._found.get(id) is found:
            held = self._held.setdefault(id, _Held(time.monotonic()))
            held.records.append(TurnRecord(id, asked, as_turn(drawn, request), self._turns.bound))
        return drawn

    async def abort(self, rids: Sequence[str] | None = None) -> None:
        await self._engine.abort(rids)

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None:
        await self._engine.pause(mode)

    async def resume(self) -> None:
        await self._engine.resume()

    async def release(self, routing_key: str) -> None:
        await self._engine.release(routing_key)

    async def close(self) -> None:
        await self._engine.close()

    # Inside.

    def _due(self, episode_id: str) -> list[TurnRecord]:
        """Turns of this episode, and of those that have waited long enough."""
        due = self._held.pop(episode_id, None)
        records = due.records if due else []
        late = time.monotonic() - HELD_SECONDS
        while self._held and next(iter(self._held.values())).began < late:
            records += self._held.popitem(last=False)[1].records
        return records

    async def _keep(self, records: Sequence[TurnRecord]) -> None:
        if records:
            await self._turns.keep(records)


def digest(request: GenerateRequest) -> str:
    """Of everything that decides what is drawn: context, sampling parameters, noise key (which says which turn of
    which episode it is), and which experts are wanted. Hex, 128 bits."""
    hasher = xxhash.xxh3_128(request.ids.astype("<i4", copy=False).tobytes())
    hasher.update(repr((request.sampling, request.noise_key, request.routes_from)).encode())
    return hasher.hexdigest()


def as_turn(drawn: Generation, request: GenerateRequest) -> Turn:
    """A generation as the log holds it."""
    return Turn(
        Author.SAMPLED, drawn.ids, drawn.logprobs, drawn.spans, request.sampling, drawn.finish.value,
        drawn.sampled_logprobs, drawn.routes,
    )  # fmt: skip


def generation(turn: Turn) -> Generation:
    """Inverse of `as_turn`, but for what says how the engine came to it."""
    assert turn.logprobs is not None  # a sampled turn has them
    return Generation(
        turn.ids, turn.logprobs, turn.spans, Finish(turn.finish), turn.sampled_logprobs, routes=turn.routes
    )
