"""The evaluation under way: a reader that holds the version in use while the loop goes on.

    publish ─► begin ──► row ──► the next batch fills, and is trained where devices are apart ──► settle ─► new weights
                 └─► [task: every answer by this version ─► the result ─► the row that was held back]

A result belongs to the batch that it measures, and so does the row of metrics it stands in: the row is held back until
the evaluation has ended. That is before the next weights, so rows are written in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from sluice.obs.metrics import MetricSink
from sluice.obs.view import View
from sluice.orchestrate.evaluation import EvalResult, Evaluator
from sluice.orchestrate.progress import Progress
from sluice.types import Version

T = TypeVar("T")


class Measuring:
    """At most one evaluation, as a task, and the rows of metrics. A failure is raised by the wait that comes first.

    Waits for: engine, verifiers, log. Unblocked by: nobody; who changes weights waits for `settle`.

    Args:
        evaluator: None where nothing is measured.
        progress: of the run; what is held back is kept there, for checkpoints.
        view: told of results.
        sinks: of the rows.
    """

    def __init__(
        self, evaluator: Evaluator | None, progress: Progress, view: View, sinks: Sequence[MetricSink]
    ) -> None:
        self._evaluator, self._progress, self._view, self._sinks = evaluator, progress, view, sinks
        self._task: asyncio.Task[None] | None = None
        self.results: dict[int, EvalResult] = {}

    @property
    def under_way(self) -> bool:
        """Begun and not settled."""
        return self._task is not None

    def begin(self, version: Version) -> None:
        """Begin to measure the weights of the last batch. There is an evaluator, and what was begun is settled."""
        assert self._evaluator is not None
        assert self._task is None
        self._progress.held = self._progress.held or {}  # a resumed run has the row already
        measured = self._measure(self._evaluator, self._progress.batch, self._progress.step, version)
        self._task = asyncio.create_task(measured, name="evaluation")

    def row(self, batch: int, row: dict[str, float]) -> None:
        """Write the row of a batch, with the result of its evaluation: at once, or when that has ended."""
        if self._progress.held is not None:
            self._progress.held = row
        else:
            self._write(batch, row)

    async def unless_failed(self, waiting: Coroutine[Any, Any, T]) -> T:
        """The result of `waiting`, or the evaluation's failure if that comes first."""
        if self._task is None:
            return await waiting
        other = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait([other, self._task], return_when=asyncio.FIRST_COMPLETED)
            if self._task.done():
                self._task.result()
            return await other
        finally:
            if not other.done():
                other.cancel()
                await asyncio.wait([other])

    async def settle(self) -> None:
        """Wait for the end.

        Raises:
            EngineError: no episode finished within the deadline. Any failure of the evaluation is raised as it is.
        """
        if self._task is None or self._evaluator is None:
            return
        async with self._evaluator.stall.deadline(lambda: "an evaluation is under way"):
            await asyncio.wait([self._task])
        task, self._task = self._task, None
        task.result()

    async def close(self) -> None:
        """Cancel what is under way and wait for its end. If it failed meanwhile, something else has ended the run."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _measure(self, evaluator: Evaluator, batch: int, step: int, version: Version) -> None:
        try:
            result = await evaluator(step, version)
        except Exception as error:
            error.add_note(f"while version {version}, of batch {batch}, was evaluated")
            raise
        self.results[batch] = result
        if batch == 0:
            self._progress.before = result.to_json()
        self._view.evaluation(batch, result.metrics())
        held, self._progress.held = self._progress.held, None
        if held:
            self._write(batch, held)

    def _write(self, batch: int, row: Mapping[str, float]) -> None:
        result = self.results.get(batch)
        metrics = {**row, **(result.metrics() if result else {})}
        for sink in self._sinks:
            sink.write(batch, metrics)
