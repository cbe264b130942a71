"""When an agent elsewhere is told that its episode is finished: not before it is in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from tests.unit.test_report_parts import episode

from sluice.config.runners import ExternalRunner
from sluice.rollout.gateway.desk import Wanted
from sluice.rollout.gateway.errors import SessionClosed
from sluice.rollout.runners.base import EpisodeRequest, turn_noise
from sluice.rollout.runners.external import ExternalDesk
from sluice.types import Episode, SamplingParams

DONE = episode("g000001.0", "g000001", (0, 3, 0))


async def leased(then: Callable[[ExternalDesk, EpisodeRequest, asyncio.Task[Episode]], Awaitable[None]]) -> None:
    """An episode that an agent has leased, and what runs it."""
    desk = ExternalDesk(ExternalRunner(), retry_after=1)
    desk.bind(cast("Any", None), cast("Any", None))  # they are asked when a lease is not kept
    request = EpisodeRequest(DONE.id, DONE.group_id, DONE.prompt, SamplingParams(), turn_noise(0))
    running = asyncio.create_task(desk.run(request))
    await asyncio.sleep(0)
    assert (await desk.lease(Wanted())).id == DONE.id
    async with asyncio.timeout(20):
        await then(desk, request, running)


def test_a_finish_is_answered_when_the_episode_is_in_the_log() -> None:
    async def then(desk: ExternalDesk, request: EpisodeRequest, running: asyncio.Task[Episode]) -> None:
        finishing = asyncio.create_task(desk.finished(DONE, {}))
        assert await running is DONE
        for _ in range(3):
            await asyncio.sleep(0)
        assert not finishing.done()
        request.receipt.settle(logged=True)
        request.receipt.settle(logged=False)
        await finishing

    asyncio.run(leased(then))


def test_an_episode_that_was_not_logged_is_none_of_the_agents_any_more() -> None:
    async def then(desk: ExternalDesk, request: EpisodeRequest, running: asyncio.Task[Episode]) -> None:
        finishing = asyncio.create_task(desk.finished(DONE, {}))
        await running
        request.receipt.settle(logged=False)
        with pytest.raises(SessionClosed, match=r"g000001\.0 was finished, and the run ended before it was in the log"):
            await finishing
        await desk.finished(DONE, {})  # nobody waits for it now

    asyncio.run(leased(then))


def test_nobody_waits_longer_for_the_log_than_its_deadline() -> None:
    async def never() -> bool:
        request = EpisodeRequest(DONE.id, DONE.group_id, DONE.prompt, SamplingParams(), turn_noise(0))
        return await request.receipt.logged(0.01)

    assert not asyncio.run(never())
