"""Who serves: the members of a fleet, and the router, which knows exactly those that do.

Each of those has confirmed the label of a version that was applied to it here, in its present life.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import httpx

from sluice.errors import EngineError, WeightsError
from sluice.rollout.engines.base import Memory, PauseMode
from sluice.rollout.engines.sglang.control import Control
from sluice.rollout.engines.sglang.member import Member, State, Unit, units
from sluice.rollout.engines.sglang.wire import LostError, Wire
from sluice.weights.base import Published

Fault = EngineError | WeightsError
T = TypeVar("T")


class Spreader(Protocol):
    """The router, as the fleet uses it; see `sluice.rollout.router.Router`."""

    @property
    def url(self) -> str: ...

    async def start(self) -> None: ...

    async def add(self, url: str, *, role: str = "regular", bootstrap_port: int | None = None) -> None: ...

    async def remove(self, url: str) -> None: ...

    async def ended(self) -> str:
        """Wait until its process ends by itself. Returns why, as far as its log tells."""
        ...

    async def close(self) -> None: ...


class Roster:
    """Members, their units, and the router before them.

    Args:
        members: the servers.
        spreader: makes a router; None when there is none.
        api_key: bearer token of the servers, which the router passes on.
        seconds: deadline of a call to the router that names none.
        transport: replaces the network to the router, for tests.
        tell: told what happens, in a line each.
        moved: called when a member stops serving.
    """

    def __init__(
        self,
        members: Sequence[Member],
        spreader: Callable[[], Spreader] | None,
        *,
        api_key: str,
        seconds: float,
        transport: httpx.AsyncBaseTransport | None,
        tell: Callable[[str], None],
        moved: Callable[[Member], None],
    ) -> None:
        self.members = list(members)
        self.units = units(self.members)
        self.wire: Wire | None = None
        """To the router; None when there is none."""
        self.mode: PauseMode | None = None
        """What the caller of the engine has paused with."""
        self._make = spreader
        self._spreader: Spreader | None = None
        self._api_key, self._seconds, self._transport = api_key, seconds, transport
        self._tell, self._moved = tell, moved

    @property
    def serves(self) -> bool:
        return any(unit.serves for unit in self.units)

    @property
    def hopeful(self) -> bool:
        """Whether a request that waits will be served."""
        return any(unit.hopeful for unit in self.units)

    @property
    def routed(self) -> bool:
        """Whether the router is there, if there is to be one."""
        return self._make is None or self.wire is not None

    @property
    def alone(self) -> bool:
        """Whether requests go straight to the only server."""
        return self._make is None

    # ── who is there ────────────────────────────────────────────────────────────────────────────────────

    def join(self, member: Member) -> None:
        """A regular server, not started yet."""
        self.members.append(member)
        self.units = units(self.members)

    def leave(self, member: Member) -> None:
        """One that is out of routing; it may have left already."""
        self.members = [each for each in self.members if each is not member]
        self.units = units(self.members)

    # ── the router ──────────────────────────────────────────────────────────────────────────────────────

    async def lead(self, make: Callable[[], Spreader]) -> None:
        """Put a router before what was alone. EngineError when it does not start; then everything is as it was."""
        try:
            await self._start_router(make)
        except BaseException:
            await self.close_router()
            raise
        self._make = make

    async def start_router(self) -> None:
        """Start one, if there is to be one, and tell it who serves."""
        if self._make is None:
            return
        await self.close_router()
        await self._start_router(self._make)

    async def _start_router(self, make: Callable[[], Spreader]) -> None:
        self._spreader = make()
        await self._spreader.start()
        for member in self.members:
            if member.state is State.SERVING:
                await self._route(member)
        self.wire = Wire(
            self._spreader.url, api_key=self._api_key, seconds=self._seconds, transport=self._transport, kind="router"
        )

    async def router_ended(self) -> str:
        """Wait until the router ends by itself. Returns why."""
        if self._spreader is None:
            raise EngineError("there is no router")
        return await self._spreader.ended()

    async def close_router(self) -> None:
        wire, spreader, self.wire, self._spreader = self.wire, self._spreader, None, None
        if wire is not None:
            await wire.close()
        if spreader is not None:
            await spreader.close()

    async def _route(self, member: Member) -> None:
        if self._spreader is not None:
            port = member.running.bootstrap_port if member.running else None
            await self._spreader.add(member.url, role=member.role, bootstrap_port=port)

    async def unroute(self, member: Member, state: State) -> None:
        """Nothing is sent there any more; what is in flight there is sent elsewhere."""
        served, member.state = member.state is State.SERVING, state
        self._moved(member)
        if served:
            await self.withdraw(member)

    async def vacate(self, member: Member) -> None:
        """What a member runs comes back as tokens."""
        await self._ask([member], lambda control: control.hold(PauseMode.RECOMPUTE, empty=True))

    async def withdraw(self, member: Member) -> None:
        """Nothing new is sent to a member. What runs there goes on; the router takes seconds over it."""
        if self._spreader is not None:
            for fault in filter(None, await faults_of([self._spreader.remove(member.url)])):
                self._tell(f"router: {said(fault)}")

    # ── pauses ──────────────────────────────────────────────────────────────────────────────────────────

    async def pause(self, mode: PauseMode, *, empty: bool = False) -> None:
        """Hold everybody who answers; see `Control.hold`. Who cannot be held is out of routing: it may be half-way."""
        for member in self._present:
            member.control.refuse_mode(mode)
        self.mode = mode
        await self._ask(self._present, lambda control: control.hold(mode, empty=empty))

    async def resume(self) -> None:
        self.mode = None
        serving = [member for member in self.members if member.state is State.SERVING]
        await self._ask(serving, lambda control: control.let_go())

    async def release_memory(self) -> None:
        """Of everybody who answers."""
        await self._ask(self._present, lambda control: control.release_memory())

    async def resume_memory(self, part: Memory) -> None:
        await self._ask(self._present, lambda control: control.resume_memory(part))

    @property
    def _present(self) -> list[Member]:
        return [member for member in self.members if member.state is not State.AWAY]

    async def _ask(self, members: Sequence[Member], what: Callable[[Control], Awaitable[None]]) -> None:
        """The same of several, side by side. Who does not do it is out of routing."""
        lives = [member.life for member in members]
        await self._drop(members, lives, await faults_of([what(member.control) for member in members]))

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────

    async def swap(self, unit: Unit, members: Sequence[Member], published: Published) -> list[Fault]:
        """Hold, load and let go members of a unit. Returns what went wrong.

        A version that is refused, twice, takes all of them out of routing; a death only the dead one: the others
        have the version, and nobody serves another.
        """
        lives = [member.life for member in members]
        faults = await faults_of([self._load(member, published) for member in members])
        if any(isinstance(fault, WeightsError) for fault in faults):
            faults = await faults_of([self._load(member, published) for member in members])
        if not any(isinstance(fault, WeightsError) for fault in faults):
            rows = zip(members, lives, faults, strict=True)
            faults = await faults_of([self._let_serve(member, life, fault) for member, life, fault in rows])
        together = any(isinstance(fault, WeightsError) for fault in faults)
        await self._drop(members, lives, faults, together=together)
        return [fault for fault in faults if fault]

    async def _load(self, member: Member, published: Published) -> None:
        await member.control.hold(self.mode or PauseMode.RECOMPUTE)
        await member.control.load(published)
        if member.state is not State.SERVING:
            await self._compare(member)

    async def _let_serve(self, member: Member, life: int, fault: Fault | None) -> None:
        if fault is not None:
            raise fault
        if member.life != life or member.state is State.AWAY:
            raise LostError(f"{member.name} was lost while it took a version")
        if self.mode is None:
            await member.control.let_go()
        if member.state is not State.SERVING:
            await self._route(member)
            member.state = State.SERVING

    async def _compare(self, member: Member) -> None:
        """WeightsError when a server that comes back holds other weights than a serving one of its shape."""
        for other in self.members:
            alike = other is not member and other.shape == member.shape and other.state is State.SERVING
            if not alike or other.control.label != member.control.label:
                continue
            here, there = await member.control.checksum(), await other.control.checksum()
            if here is not None and there is not None and here != there:
                raise WeightsError(
                    f"{member.name} holds weights with the checksum {here} under the label {member.control.label}; "
                    f"{other.name} has {there}",
                    hint="one of them is damaged: restart it",
                )
            return

    async def _drop(
        self, members: Sequence[Member], lives: Sequence[int], faults: Sequence[Fault | None], *, together: bool = False
    ) -> None:
        """Take out those with a fault, or all. Who did not answer is away: its keeper brings it back."""
        for member, life, fault in zip(members, lives, faults, strict=True):
            if fault is not None:
                self._tell(f"{member.name}: out of routing: {said(fault)}")
            if member.life != life:
                continue  # lost meanwhile, and another life has begun
            if fault is not None and not isinstance(fault, WeightsError):
                await self.unroute(member, State.AWAY)
                member.doubted.set()
            elif (fault is not None or together) and member.state is not State.AWAY:
                await self.unroute(member, State.STALE)


async def faults_of(calls: Sequence[Awaitable[object]]) -> list[Fault | None]:
    """Run calls side by side to their ends. Returns what each raised; anything but a fault is raised."""
    found: list[Fault | None] = []
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, Fault):
            raise result
        found.append(result if isinstance(result, Fault) else None)
    return found


async def all_of(calls: Sequence[Awaitable[T]]) -> list[T]:
    """Run calls side by side. The first failure cancels the others, waits for them, and is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def said(fault: Fault) -> str:
    """The message of an error, without its hint."""
    return str(fault.args[0])
