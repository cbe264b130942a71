"""What a session has in flight at the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sluice.rollout.engines.base import Engine, GenerateRequest, Generation

_SECONDS = 10.0
"""How long an abort and a cancelled call wait for the engine to let go of what it was drawing."""


class Flights:
    """Requests that are being drawn, by their ids."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tasks: dict[str, asyncio.Task[Generation]] = {}

    async def draw(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """All at once. When one fails, or the call is cancelled, the others end too."""
        tasks = {request.rid: asyncio.create_task(self._engine.generate(request)) for request in requests}
        self._tasks |= tasks
        try:
            return list(await asyncio.gather(*tasks.values()))
        finally:
            for rid, task in tasks.items():
                task.cancel()
                del self._tasks[rid]
            await _ended(list(tasks.values()))

    async def abort(self) -> None:
        """End all that are in flight now. Returns when they have ended, or the engine is too slow."""
        tasks = dict(self._tasks)
        if tasks:
            await self._engine.abort(list(tasks))
            await _ended(list(tasks.values()))


async def _ended(tasks: Sequence[asyncio.Task[Generation]]) -> None:
    """Wait until these end, whatever their end is."""
    done, _ = await asyncio.wait(tasks, timeout=_SECONDS)
    for task in done:
        if not task.cancelled():
            task.exception()  # looked at, so that nobody warns
