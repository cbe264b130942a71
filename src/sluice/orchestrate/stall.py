"""How long nothing may finish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sluice.errors import EngineError


class Stall:
    """The deadline of every wait for episodes of one engine. Each episode that finishes puts it off, whoever waits.

    A batch and an evaluation share an engine: while the episodes of one stand behind those of the other, the other's
    finish, and the engine is not stuck.

    Args:
        seconds: in which some episode must finish; see `limits.stall_seconds`.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._open: set[asyncio.Timeout] = set()

    def finished(self) -> None:
        """An episode has finished."""
        until = asyncio.get_running_loop().time() + self._seconds
        for each in self._open:
            if not each.expired():
                each.reschedule(until)

    @asynccontextmanager
    async def deadline(self, what: Callable[[], str]) -> AsyncIterator[None]:
        """Bound the wait inside the block.

        Args:
            what: is under way, for the message.

        Raises:
            EngineError: nothing finished within the deadline.
        """
        try:
            async with asyncio.timeout(self._seconds) as timeout:  # wait_for of 3.11 may swallow a Ctrl-C
                self._open.add(timeout)
                try:
                    yield
                finally:
                    self._open.discard(timeout)
        except TimeoutError as error:
            raise EngineError(
                f"no episode has finished for {self._seconds:.0f} s; {what()}",
                hint="look at the engine's log; limits.stall_seconds sets this deadline",
            ) from error
