"""Work of the trainer beside the event loop: it does not block it, keeps its thread, and is never left half done."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from sluice.orchestrate.beside import Beside


def test_the_loop_goes_on_while_work_runs_apart() -> None:
    """The work waits for something that only the loop can bring about."""
    came = threading.Event()

    async def body() -> bool:
        beside = Beside(apart=True)
        asyncio.get_running_loop().call_later(0.01, came.set)
        found = await beside(came.wait, 30.0)
        beside.close()
        return found

    assert asyncio.run(body())


def test_work_in_the_same_process_stays_in_the_loops_thread() -> None:
    async def body() -> int:
        return await Beside(apart=False)(threading.get_ident)

    assert asyncio.run(body()) == threading.get_ident()


def test_one_thread_with_its_number_of_torch_threads() -> None:
    async def body() -> set[tuple[int, int]]:
        beside = Beside(apart=True, threads=1)
        found = {await beside(lambda: (threading.get_ident(), torch.get_num_threads())) for _ in range(5)}
        beside.close()
        return found

    ((thread, count),) = asyncio.run(body())
    assert thread != threading.get_ident()
    assert count == 1


def test_an_error_is_raised_where_the_work_was_asked_for() -> None:
    async def body() -> None:
        await Beside(apart=True)(int, "seven")

    with pytest.raises(ValueError, match="seven"):
        asyncio.run(body())


def test_a_cancelled_step_is_finished_first() -> None:
    """Ctrl-C in the middle of an optimizer step: the step ends, then the run does."""
    began, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def step() -> None:
        began.set()
        assert go_on.wait(30.0)
        done.append("step")

    async def body() -> None:
        beside = Beside(apart=True)
        task = asyncio.create_task(beside(step))
        while not began.is_set():  # noqa: ASYNC110 - set by the other thread
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        done.append("cancelled")
        beside.close()

    asyncio.run(body())
    assert done == ["step", "cancelled"]
