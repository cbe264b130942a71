"""An evaluation beside the loop: what waits for it, what it holds back, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from sluice.errors import EngineError
from sluice.obs.metrics import JsonlSink, read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate.evaluation import EvalResult
from sluice.orchestrate.measuring import Measuring
from sluice.orchestrate.progress import Progress
from sluice.orchestrate.stall import Stall
from sluice.types import Version
from sluice.weights.base import Manifest, Published


class Weights:
    """Version 5, and how many hold it."""

    def __init__(self) -> None:
        self.manifest = Manifest(Version(5), None, "", {}, 0)
        self.holders = 1

    def hold(self) -> None:
        self.holders += 1

    def release(self) -> None:
        self.holders -= 1


FIVE = cast("Published", Weights())


class Answering:
    """Stands where an evaluator does: it has answered when it is told so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.stall = Stall(60)
        self.sink = None
        self.answered = asyncio.Event()
        self.ended = False
        self._error = error

    async def __call__(self, step: int, version: Version) -> EvalResult:
        try:
            await self.answered.wait()
            if self._error is not None:
                raise self._error
            return EvalResult(step / 10, None, 1.0, 1, 0, ())
        finally:
            self.ended = True


def measuring(answering: Answering, folder: Path, progress: Progress | None = None) -> Measuring:
    sink = JsonlSink(folder / "metrics.jsonl")
    return Measuring(cast("Any", answering), progress or Progress(batch=4, step=5), NullView(), [sink])


def rows(folder: Path) -> list[Mapping[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def test_a_row_is_held_back_until_the_result_that_belongs_to_it_is_there(tmp_path: Path) -> None:
    async def main() -> None:
        progress = Progress(batch=4, step=5)
        answering = Answering()
        one = measuring(answering, tmp_path, progress)
        one.row(3, {"reward/mean": 0.25})
        one.begin(FIVE)
        assert progress.rows == 3
        one.row(4, {"reward/mean": 0.5})
        assert [row["step"] for row in rows(tmp_path)] == [3]
        assert progress.held == {"reward/mean": 0.5}, "what a checkpoint would keep"
        answering.answered.set()
        await one.settle()
        assert progress.held is None
        assert progress.rows == 4
        progress.batch = 5
        one.row(5, {"reward/mean": 0.75})

    asyncio.run(main())
    assert [(row["step"], row["reward/mean"], row.get("eval/accuracy")) for row in rows(tmp_path)] == [
        (3, 0.25, None), (4, 0.5, 0.5), (5, 0.75, None)
    ]  # fmt: skip


def test_a_row_that_a_checkpoint_kept_is_written_with_the_new_result(tmp_path: Path) -> None:
    async def main() -> None:
        answering = Answering()
        one = measuring(answering, tmp_path, Progress(batch=4, step=5, held={"reward/mean": 0.5}))
        one.begin(FIVE)
        answering.answered.set()
        await one.settle()

    asyncio.run(main())
    (row,) = rows(tmp_path)
    assert (row["step"], row["reward/mean"], row["eval/accuracy"]) == (4, 0.5, 0.5)


def test_a_failure_ends_the_wait_for_the_next_batch(tmp_path: Path) -> None:
    async def main() -> None:
        answering = Answering(EngineError("no weights", hint="none"))
        one = measuring(answering, tmp_path)
        one.begin(FIVE)
        stopped = asyncio.Event()

        async def batch() -> None:
            answering.answered.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        with pytest.raises(EngineError, match="no weights") as caught:
            async with asyncio.timeout(60):
                await one.unless_failed(batch())
        assert stopped.is_set(), "nobody waits for the batch any more"
        assert "version 5.0, of batch 4" in "".join(caught.value.__notes__)
        await one.close()

    asyncio.run(main())


def test_a_failure_is_raised_before_the_weights_change(tmp_path: Path) -> None:
    async def main() -> None:
        answering = Answering(EngineError("no weights", hint="none"))
        one = measuring(answering, tmp_path)
        one.begin(FIVE)
        answering.answered.set()
        with pytest.raises(EngineError, match="no weights"):
            await one.settle()

    asyncio.run(main())


def test_ctrl_c_while_it_goes_on_ends_the_wait_and_closing_ends_it(tmp_path: Path) -> None:
    async def main() -> None:
        answering = Answering()
        one = measuring(answering, tmp_path)
        one.begin(FIVE)
        waiting = asyncio.create_task(one.unless_failed(asyncio.Event().wait()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not answering.ended, "the loop's wait is not the evaluation's"
        await one.close()
        assert answering.ended
        assert not one.under_way

    asyncio.run(main())
    assert rows(tmp_path) == []


def test_an_evaluation_that_stands_still_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        answering = Answering()
        answering.stall = Stall(0.01)
        one = measuring(answering, tmp_path)
        one.begin(FIVE)
        with pytest.raises(EngineError, match=r"no episode has finished for 0 s; an evaluation is under way"):
            await one.settle()
        await one.close()

    asyncio.run(main())


def test_answers_of_an_evaluation_put_off_the_deadline_of_a_batch() -> None:
    """A batch's episodes stand behind the evaluation's for five deadlines, in each of which one answer finishes."""

    async def main() -> None:
        stall, loop = Stall(0.4), asyncio.get_running_loop()
        finished = loop.create_future()
        for number in range(1, 10):
            loop.call_later(0.2 * number, stall.finished)
        loop.call_later(2.0, finished.set_result, "an episode")
        async with stall.deadline(lambda: "1 is under way"):
            assert await finished == "an episode"

    asyncio.run(main())


def test_rows_of_later_batches_wait_for_the_one_that_is_measured(tmp_path: Path) -> None:
    """An engine of its own: two batches are trained while one is measured."""

    async def main() -> None:
        progress, weights, answering = Progress(batch=4, step=5), Weights(), Answering()
        one = measuring(answering, tmp_path, progress)
        one.begin(cast("Published", weights))
        assert weights.holders == 2, "they are there until it has ended, whatever is published"
        for batch in (4, 5, 6):
            progress.batch, progress.step = batch, batch + 1
            one.row(batch, {"reward/mean": batch / 10})
        assert rows(tmp_path) == []
        assert progress.held == {"reward/mean": 0.4}
        answering.answered.set()
        await one.settle()
        await asyncio.sleep(0)
        assert weights.holders == 1

    asyncio.run(main())
    found = [(row["step"], row["reward/mean"], row.get("eval/accuracy")) for row in rows(tmp_path)]
    assert found == [(4, 0.4, 0.5), (5, 0.5, None), (6, 0.6, None)], "and it is called after the step that it measures"
