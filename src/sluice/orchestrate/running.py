"""Running the loop's coroutine from plain code, a notebook's cells included."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(main: Coroutine[Any, Any, T]) -> T:
    """What `asyncio.run` does, also where an event loop is running already, as it is in a notebook.

    The coroutine then has a thread and a loop of its own. Ctrl-C, or a notebook's interrupt, cancels it; its
    clean-up is waited for, and KeyboardInterrupt is raised, as by `asyncio.run`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    begun: Future[Callable[[], object]] = Future()
    ended: Future[T] = Future()

    async def told() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # asyncio.run made one
        begun.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await main

    def drive() -> None:
        try:
            ended.set_result(asyncio.run(told()))
        except BaseException as error:  # noqa: BLE001  (raised again where it was called)
            ended.set_exception(error)

    thread = Thread(target=drive, name="sluice-run")
    try:
        thread.start()
        return ended.result()
    except KeyboardInterrupt:
        if thread.is_alive():
            with suppress(RuntimeError):  # it ended at the same moment, its loop is closed
                begun.result()()
        raise
    finally:
        if thread.ident is not None:  # it was started
            thread.join()
