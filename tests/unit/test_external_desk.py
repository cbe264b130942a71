"""When an agent elsewhere is told that its episode is finished: not before it is in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from tests.unit.test_report_parts import episode

from sluice.config.runners import ExternalRunner
from sluice.rollout.gateway.desk import Wanted
from sluice.rollout.gateway.errors import SessionClosed, UnknownSession
from sluice.rollout.runners.base import EpisodeRequest, turn_noise
from sluice.rollout.runners.external import ExternalDesk
from sluice.types import Episode, Outcome, SamplingParams

DONE = episode("g000001.0", "g000001", (0, 3, 0))


class Closed:
    """A gateway whose session is closed already: its agent's finish is under way."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def finish(self, id: str, outcome: Outcome, reason: str) -> Episode:
        self.asked.set()
        raise UnknownSession(f"{id} was finished before")


async def leased(
    then: Callable[[ExternalDesk, EpisodeRequest, asyncio.Task[Episode]], Awaitable[None]],
    gateway: Closed | None = None,
    lease_seconds: float = 60.0,
) -> None:
    """An episode that an agent has leased, and what runs it; the gateway is asked when a lease is not kept."""
    desk = ExternalDesk(ExternalRunner(lease_seconds=lease_seconds), retry_after=1)
    desk.bind(cast("Any", None), cast("Any", gateway))
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


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_lease_that_ends_while_its_agent_finishes(cancelled: bool) -> None:
    """The agent's episode counts, and the end of the run is no failure of its own."""

    async def main() -> None:
        gateway = Closed()

        async def then(desk: ExternalDesk, request: EpisodeRequest, running: asyncio.Task[Episode]) -> None:
            if cancelled:
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
                assert gateway.asked.is_set()
                return
            await gateway.asked.wait()
            request.receipt.settle(logged=True)
            await desk.finished(DONE, {})
            assert await running is DONE

        await leased(then, gateway, lease_seconds=60.0 if cancelled else 0.01)

    asyncio.run(main())


def test_nobody_waits_longer_for_the_log_than_its_deadline() -> None:
    async def never() -> bool:
        request = EpisodeRequest(DONE.id, DONE.group_id, DONE.prompt, SamplingParams(), turn_noise(0))
        return await request.receipt.logged(0.01)

    assert not asyncio.run(never())
