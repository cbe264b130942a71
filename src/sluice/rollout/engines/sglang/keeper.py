"""Liveness is a lease: a server that ends, falls silent, or serves other weights is taken out and brought back.

keep(member):  until lost ──► lose: out of routing, in-flight turns go elsewhere
                 ▲   waits for: the end of the process, the next lease, a doubt of `Flights`
                 └── revive: started again, given the weights of the run, then routed to
"""

from __future__ import annotations

import asyncio
import signal
from typing import Protocol

from sluice.errors import EngineError, WeightsError
from sluice.rollout.engines.sglang.member import Member, State
from sluice.rollout.engines.sglang.wire import RefusedError

LEASE_SECONDS = 3.0
"""Between two looks at a server."""
ANSWER_SECONDS = 10.0
"""How long a server may take to answer a look. It does so beside whatever it computes."""
MISSES = 2
"""Looks in a row without an answer after which a server is lost."""


TOLD = "it was told to end"
"""Why a server is lost that got SIGTERM from outside: its host is wanted for something else."""


class Owner(Protocol):
    """The fleet, as its keepers see it."""

    async def vacate(self, member: Member) -> None:
        """Send it nothing more, and bring back the turns that it runs, as tokens."""
        ...

    async def lose(self, member: Member, why: str) -> None:
        """Take it out of routing; what it was busy with is sent elsewhere."""
        ...

    async def room(self) -> None:
        """Wait until a server may be started."""
        ...

    async def admit(self, member: Member) -> None:
        """Give a server that answers the weights of the run, and route to it."""
        ...

    async def give_up(self, member: Member, why: str) -> None:
        """It is not started again."""
        ...

    async def refuse(self, member: Member, why: str) -> None:
        """A newcomer did not come up: it is let go."""
        ...


async def enlist(owner: Owner, member: Member) -> None:
    """Bring up a newcomer, and watch over it from then on."""
    member.returning = True
    try:
        await member.start()
        await owner.admit(member)
    except (EngineError, WeightsError) as error:
        await owner.refuse(member, str(error.args[0]))
    else:
        member.returning = False
        await keep(owner, member)


async def keep(owner: Owner, member: Member) -> None:
    """Watch over one member for as long as the fleet lives, or until it is given up."""
    while True:
        why = await until_lost(member)
        member.returning = True
        if why == TOLD:
            await owner.vacate(member)
            member.restarts -= 1  # it did nothing wrong
        await owner.lose(member, why)
        if not await revive(owner, member, why):
            return
        member.returning = False


async def until_lost(member: Member) -> str:
    """Wait until the member is lost. Returns why."""
    process = member.process
    ended = asyncio.ensure_future(process.wait()) if process else asyncio.Future[int]()
    while True:
        doubt = asyncio.ensure_future(member.doubted.wait())
        try:
            await asyncio.wait({ended, doubt}, timeout=LEASE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            member.doubted.clear()
            if ended.done() and ended.result() == -signal.SIGTERM:
                return TOLD
            if ended.done():
                said = process.last_error() if process else ""
                return f"it ended with status {ended.result()}{': ' if said else ''}{said}"
            why = await look(member)
        except BaseException:
            ended.cancel()
            raise
        finally:
            doubt.cancel()
        if why:
            ended.cancel()
            return why


async def look(member: Member) -> str:
    """Ask a member what it serves. Returns why it is lost; empty when it is not."""
    control, expected = member.control, member.control.label
    if member.state is State.AWAY:
        return "it did not answer"
    try:
        label = await control.weights_label(ANSWER_SECONDS)
        if member.owned and await control.is_leaving(ANSWER_SECONDS):
            return TOLD
    except RefusedError:
        member.misses = 0
        return ""  # it is alive; what it may do is another question
    except EngineError as error:
        member.misses += 1
        return f"it did not answer {member.misses} times in a row: {error.args[0]}" if member.misses >= MISSES else ""
    member.misses = 0
    settled = not control.updating and control.label == expected
    if member.state is State.SERVING and settled and label != expected:
        return f"it serves weights called {label!r}, not {expected!r}: it was restarted, or somebody else updates it"
    return ""


async def revive(owner: Owner, member: Member, why: str) -> bool:
    """Bring a lost member back: its process again, or, when it is not ours, whoever answers at its URL.

    Returns False when it was started as often as it may be.
    """
    while True:
        if member.owned and member.restarts >= member.config.restarts:
            await owner.give_up(member, why)
            return False
        if not member.owned:
            await asyncio.sleep(LEASE_SECONDS)
        member.restarts += member.owned
        try:
            await member.stop()
            await owner.room()
            await member.start()
            await owner.admit(member)
            return True
        except (EngineError, WeightsError) as error:
            why = str(error.args[0])
