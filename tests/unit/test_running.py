"""The loop's coroutine runs where no event loop is running, and where one is."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from sluice.orchestrate.running import run_to_end


async def answer(value: int) -> int:
    await asyncio.sleep(0)
    if value < 0:
        raise ValueError("negative")
    return value


async def in_a_notebook(value: int) -> int:
    """A cell runs inside the kernel's loop."""
    return run_to_end(answer(value))


def test_with_and_without_a_running_loop() -> None:
    assert run_to_end(answer(3)) == 3
    assert asyncio.run(in_a_notebook(4)) == 4
    with pytest.raises(ValueError, match="negative"):
        run_to_end(answer(-1))
    with pytest.raises(ValueError, match="negative"):
        asyncio.run(in_a_notebook(-1))


def test_an_interrupted_cell_cancels_the_run_and_waits_for_its_clean_up() -> None:
    """A kernel's interrupt is a SIGINT that raises KeyboardInterrupt in the main thread."""
    started, cleaned = threading.Event(), threading.Event()

    async def endless() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.set()

    def interrupt() -> None:
        assert started.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    async def cell() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a kernel's; asyncio.run has its own
        run_to_end(endless())

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(cell())
    finally:
        signal.signal(signal.SIGINT, before)
        interrupter.join(30)
    assert cleaned.is_set()
