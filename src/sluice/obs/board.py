"""What is known of a run at this moment, for views to show."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sluice.obs.format import finite_items

HISTORY = 60
"""Steps in the reward's sparkline."""
_RATE_STEPS = 20
"""The time that is left is told from the speed of this many last steps."""


@dataclass(slots=True)
class Board:
    """Values are replaced, never changed in place: a refreshing thread may read while a step is noted.

    `total` is the number of steps of the run, `steps` that of the stage shown now.
    """

    clock: Callable[[], float] = time.monotonic
    name: str = ""
    folder: str = ""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    stage: str = "train"
    step: int = 0
    steps: int = 0
    total: int = 0
    phase: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    rewards: tuple[float, ...] = ()
    evaluations: tuple[tuple[int, float], ...] = ()
    _started: float | None = None
    _marks: tuple[tuple[float, int], ...] = ()

    def start(self, name: str, steps: int, folder: str, facts: Mapping[str, str]) -> None:
        """A run begins."""
        self.name, self.steps, self.total, self.folder, self.facts = name, steps, steps, folder, dict(facts)
        self._started = self.clock()

    def note(self, stage: str, step: int, steps: int, metrics: Mapping[str, float | None]) -> None:
        """A step of a stage is done. A metric that it lacks keeps its last value within the stage."""
        now = self.clock()
        if stage != self.stage:
            self.stage, self.metrics, self.rewards, self._marks = stage, {}, (), ()
        if self._started is None:
            self._started = now
        self.step, self.steps = step, steps
        fresh = finite_items(metrics)
        self.metrics = {**self.metrics, **fresh}
        if "reward/mean" in fresh:
            self.rewards = (*self.rewards, fresh["reward/mean"])[-HISTORY:]
        self._marks = (*self._marks, (now, step))[-_RATE_STEPS - 1 :]

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """An evaluation is done."""
        fresh = finite_items(metrics)
        self.metrics = {**self.metrics, **fresh}
        if "eval/accuracy" in fresh:
            before = tuple(each for each in self.evaluations if each[0] != step)
            self.evaluations = (*before, (step, fresh["eval/accuracy"]))

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return 0.0 if self._started is None else self.clock() - self._started

    @property
    def remaining(self) -> float | None:
        """Seconds until the last step at the speed of the latest ones; None while that is unknown."""
        if len(self._marks) < 2 or self._marks[-1][1] <= self._marks[0][1]:
            return None
        (then, first), (now, last) = self._marks[0], self._marks[-1]
        return max(0.0, (now - then) / (last - first) * (self.steps - last) - (self.clock() - now))
