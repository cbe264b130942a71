"""What the loop waits on."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from sluice.errors import EngineError
from sluice.orchestrate.producer import Producer
from sluice.orchestrate.stall import Stall


def producer(stall_seconds: float) -> Producer:
    """One that only hands over what is finished: its parts are not used for that."""
    none = cast("Any", None)
    return Producer(
        none, none, none, none, seed=0, recovered={}, refusal=lambda version, due: "", stall=Stall(stall_seconds)
    )  # fmt: skip


def test_ctrl_c_at_the_moment_an_episode_finishes_is_not_lost() -> None:
    """Ctrl-C cancels the run's task; `asyncio.wait_for` of Python 3.11 returns the finished episode instead."""

    async def main() -> None:
        waited_on = producer(60)
        waiting = asyncio.create_task(waited_on.next())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        finished: asyncio.Task[Any] = asyncio.create_task(asyncio.sleep(0, "an episode"))
        await finished
        waited_on._done(finished)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())


def test_nothing_finished_in_time_is_an_error_that_says_so() -> None:
    with pytest.raises(EngineError, match=r"no episode has finished for 0 s; 0 are under way"):
        asyncio.run(producer(0.01).next())
