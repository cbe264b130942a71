"""Regular expressions on text that a model wrote: a match that backtracks without end is given up.

Python's `re` cannot be stopped. The `regex` package takes a timeout and lets other threads run, so a match runs in a
thread. Its clock is the CPU time of the whole process, which the trainer's threads use up too; therefore a match that
it gives up is tried again until the thread itself has used its time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import regex

EXTRACT_SECONDS = 5.0
"""CPU time in which a component's `pattern` must find the answer."""


class TooSlowError(Exception):
    """A match took longer than its deadline."""


class TimedPattern:
    """A compiled regular expression whose matches have a deadline, in seconds of CPU time."""

    def __init__(self, pattern: str, *, seconds: float, ignore_case: bool = False) -> None:
        self._pattern: Any = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
        self._seconds = seconds

    async def fullmatch(self, text: str) -> bool:
        """Whether all of `text` matches. Raises TooSlowError."""
        return (
            await self._run(lambda timeout: self._pattern.fullmatch(text, timeout=timeout, concurrent=True)) is not None
        )

    async def search(self, text: str) -> bool:
        """Whether some part of `text` matches. Raises TooSlowError."""
        return await self._run(lambda timeout: self._pattern.search(text, timeout=timeout, concurrent=True)) is not None

    async def last(self, text: str) -> str:
        """The last match in `text`, its first group if it has one, stripped; empty without a match.

        Raises:
            TooSlowError: it was not found in time.
        """
        return await asyncio.to_thread(self.last_now, text)

    def last_now(self, text: str) -> str:
        """`last`, in the thread that calls it."""
        found: deque[Any] = self._timed(
            lambda timeout: deque(self._pattern.finditer(text, timeout=timeout, concurrent=True), maxlen=1)
        )
        if not found:
            return ""
        return ((found[0].group(1) if self._pattern.groups else found[0].group()) or "").strip()

    async def _run(self, match: Any) -> Any:
        return await asyncio.to_thread(self._timed, match)

    def _timed(self, match: Any) -> Any:
        start, timeout = time.thread_time(), self._seconds
        while True:
            try:
                return match(timeout)
            except TimeoutError:
                if time.thread_time() - start >= self._seconds:
                    raise TooSlowError(
                        f"the pattern {self._pattern.pattern!r} was not done in {self._seconds:g} s of CPU time: "
                        "it backtracks too much on this text"
                    ) from None
                timeout *= 2
