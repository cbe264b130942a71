"""The evaluation under way: a reader that holds the version in use while the loop goes on.

    publish ─► begin ──► row ──► the next batch fills, and is trained where devices are apart ──► settle ─► new weights
                 └─► [task: every answer by this version ─► the result ─► the row that was held back]

A result belongs to the batch that it measures, and so does the row of metrics it stands in: the row is held back until
the evaluation has ended. With an engine of its own an evaluation has weights of its own, and may last for several
batches; their rows wait for it too, so that rows are written in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from sluice.obs.metrics import MetricSink
from sluice.obs.view import View
from sluice.orchestrate.evaluation import EvalResult, Evaluator
from sluice.orchestrate.progress import Progress
from sluice.weights.base import Published
from sluice.weights.store import activate

T = TypeVar("T")


class Measuring:
    """At most one evaluation, as a task, and the rows of metrics. A failure is raised by the wait that comes first.

    Waits for: engine, verifiers, log. Unblocked by: nobody; who changes the weights that are read waits for `settle`.

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
        self._batch = progress.batch
        self._later: list[tuple[int, Mapping[str, float]]] = []
        self.results: dict[int, EvalResult] = {}

    @property
    def under_way(self) -> bool:
        """Begun and not settled."""
        return self._task is not None

    @property
    def batch(self) -> int:
        """The last one that was measured or is."""
        return self._batch

    @property
    def apart(self) -> bool:
        """An engine of its own answers: weights may change meanwhile."""
        return self._evaluator is not None and self._evaluator.sink is not None

    def begin(self, published: Published) -> None:
        """Begin to measure the weights of the last batch. There is an evaluator, and what was begun is settled."""
        assert self._evaluator is not None
        assert self._task is None
        self._progress.held = self._progress.held or {}  # a resumed run has the row already
        self._batch = self._progress.batch
        published.hold()
        work = self._measure(self._evaluator, self._batch, self._progress.step, published)
        self._task = asyncio.create_task(work, name="evaluation")
        self._task.add_done_callback(lambda _: published.release())

    def row(self, batch: int, row: dict[str, float]) -> None:
        """Write the row of a batch, with the result of its evaluation: at once, or when the one under way has ended."""
        if self._progress.held is None:
            self._write(batch, row)
        elif batch == self._batch:
            self._progress.held = row
        else:
            self._later.append((batch, row))

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

    async def _measure(self, evaluator: Evaluator, batch: int, step: int, published: Published) -> None:
        version = published.manifest.version
        try:
            if evaluator.sink is not None:
                await activate(published, [evaluator.sink])
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
        later, self._later = self._later, []
        for number, row in later:
            self._write(number, row)

    def _write(self, batch: int, row: Mapping[str, float]) -> None:
        result = self.results.get(batch)
        metrics = {**row, **(result.metrics() if result else {})}
        for sink in self._sinks:
            sink.write(batch, metrics)
