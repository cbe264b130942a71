"""Where the trainer computes: in the loop's thread, or beside it so that episodes go on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Beside:
    """Runs the trainer's work, one piece at a time, always in the same thread.

    Where engine and trainer are both in this process (`apart` false), in the thread of the event loop: the two would
    only take the processor from each other, and a run stays reproducible at every lag. Where one of them is in
    processes of its own, in a second thread: the event loop goes on handing out turns, taking in episodes and
    rewarding them.

    Args:
        apart: engine or trainer compute elsewhere.
        threads: of torch in the second thread, where the number is one per thread; None leaves torch's default.
    """

    def __init__(self, *, apart: bool, threads: int | None = None) -> None:
        self.apart = apart
        self._threads = threads
        self._pool = ThreadPoolExecutor(1, "trainer", initializer=self._begin) if apart else None

    def _begin(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)

    async def __call__(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work`. A cancellation waits for its end: half an optimizer step cannot be left."""
        if self._pool is None:
            return work(*args, **kwargs)
        running = asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if not running.done():
                await asyncio.wait([running])
            if not running.cancelled():
                running.exception()  # seen; the cancellation is what ends the run
            raise

    def close(self) -> None:
        """End the thread. Harmless when repeated."""
        if self._pool is not None:
            self._pool.shutdown()
