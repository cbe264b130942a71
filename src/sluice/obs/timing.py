"""Where the time goes: seconds by named phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

OTHER = "other"
"""The phase of time that is in no named one."""


class PhaseTimer:
    """Accumulates seconds by phase. Nested phases are exclusive: the inner one's time is not in the outer one.

    Not for threads. Phases of tasks that interleave are counted for the one entered last.

    Args:
        clock: seconds that only grow; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._lap: dict[str, float] = {}
        self._open: list[list[str]] = []  # a list of its own for each entry, told apart by identity
        self._last = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block for `name`."""
        self._account()
        entry = [name]
        self._open.append(entry)
        try:
            yield
        finally:
            self._account()
            self._open = [each for each in self._open if each is not entry]

    def seconds(self, name: str) -> float:
        """Seconds of a phase so far; 0 for one that was never entered."""
        self._account()
        return self._seconds.get(name, 0.0)

    @property
    def wall_seconds(self) -> float:
        """All seconds, those before a resume included."""
        self._account()
        return sum(self._seconds.values())

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap."""
        self._account()
        lap, self._lap = self._lap, {}
        return lap

    def split(self) -> dict[str, float]:
        """Share of each phase in all time, largest first; they sum to 1. Empty before any time passed."""
        total = self.wall_seconds
        ordered = sorted(self._seconds.items(), key=lambda item: -item[1])
        return {name: seconds / total for name, seconds in ordered} if total > 0 else {}

    def state_dict(self) -> dict[str, Any]:
        """Seconds by phase, for a checkpoint."""
        self._account()
        return {"seconds": dict(self._seconds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a checkpoint; what this process counted before is kept on top."""
        self._account()
        for name, seconds in state["seconds"].items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _account(self) -> None:
        now = self._clock()
        name = self._open[-1][0] if self._open else OTHER
        passed, self._last = now - self._last, now
        if passed > 0:
            self._seconds[name] = self._seconds.get(name, 0.0) + passed
            self._lap[name] = self._lap.get(name, 0.0) + passed
