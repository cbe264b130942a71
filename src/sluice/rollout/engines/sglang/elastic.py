"""A fleet that grows and shrinks while it serves.

    scale(n) ──► recruit: started beside the others, given the weights of the run, then routed to
             │            one that does not come up is let go again, and told
             └─► dismiss: out of the router; its turns come back as tokens and go on elsewhere; then it is ended

Newcomers and those that leave are watched over by `keeper`, as every server is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from sluice.errors import CapabilityError, EngineError
from sluice.rollout.engines.sglang.hosting import Hosts
from sluice.rollout.engines.sglang.keeper import Owner, enlist, keep
from sluice.rollout.engines.sglang.member import Member, State
from sluice.rollout.engines.sglang.roster import Roster, Spreader


@dataclass(slots=True)
class Growth:
    """What a fleet grows by: servers like those it began with.

    Attributes:
        make: the server of a number that nobody had before, on these devices.
        spreader: makes the router that a second server needs; None when the recipe allows none.
        hosts: where they are started; told when one is not coming back.
        next: number of the next one.
        free: devices of further servers, a set each; None when servers take none.
    """

    make: Callable[[int, str], Member]
    spreader: Callable[[], Spreader] | None
    hosts: Hosts
    next: int
    free: list[str] | None = None

    def recruit(self) -> Member:
        """Another server, not started. There is a device for it: `Elastic.scale` has counted."""
        number, self.next = self.next, self.next + 1
        member = self.make(number, self.free.pop(0) if self.free is not None else "")
        member.new = True
        return member

    def left(self, member: Member) -> None:
        """Its place is free."""
        self.hosts.left(member.name)
        if self.free is not None and member.devices:
            self.free.append(member.devices)


@dataclass(frozen=True, slots=True)
class Strength:
    """How many servers there are.

    Attributes:
        wanted: by the last call of `scale`, or by the recipe.
        serving: get requests.
        starting: newcomers, and lost ones that are being brought back.
        leaving: not ended yet.
        limit: at most so many have a device; None where none is needed.
    """

    wanted: int
    serving: int
    starting: int
    leaving: int
    limit: int | None


class Crew(Owner, Protocol):
    """The fleet, as the one that changes it sees it."""

    async def lead(self, make: Callable[[], Spreader]) -> None:
        """Put a router before the only server, so that others can join it."""
        ...

    async def part(self, member: Member) -> None:
        """Take a member out of the fleet; what it runs goes on elsewhere."""
        ...

    def fail(self, why: str) -> None:
        """Nothing is served from now on."""
        ...


@dataclass(slots=True, eq=False)
class Elastic:
    """The keepers of a fleet, and changes of its size.

    Attributes:
        crew: the fleet.
        roster: its members.
        growth: what it grows by; None when its servers are not for us to start or end.
        tell: told what happens, in a line each.
        wanted: servers.
        faults: why newcomers did not come up, since the last `scale`.
    """

    crew: Crew
    roster: Roster
    growth: Growth | None
    tell: Callable[[str], None]
    wanted: int = 0
    faults: list[str] = field(default_factory=list[str])
    _keepers: dict[str, asyncio.Task[None]] = field(default_factory=dict[str, "asyncio.Task[None]"])
    _leaving: dict[Member, asyncio.Task[None]] = field(default_factory=dict[Member, "asyncio.Task[None]"])
    _lead: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Watch over everybody who is there."""
        self.wanted = len(self.roster.members)
        for member in self.roster.members:
            self.keep(keep(self.crew, member), member.name)

    def keep(self, keeper: Coroutine[Any, Any, None], name: str) -> None:
        """A keeper that fails takes the engine with it: nobody would watch over its server."""
        self._keepers[name] = self._run(keeper, name)

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                self.crew.fail(f"watching over {name} failed: {task.exception()!r}")

        task = asyncio.create_task(work, name=name)
        task.add_done_callback(ended)
        return task

    async def close(self) -> None:
        """End every keeper, and those servers that were leaving."""
        leaving = list(self._leaving)
        tasks = [*self._keepers.values(), *self._leaving.values(), *([self._lead] if self._lead else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._keepers, self._leaving, self._lead = {}, {}, None
        await asyncio.gather(*(member.stop() for member in leaving))

    # ── size ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def strength(self) -> Strength:
        staying = [member for member in self.roster.members if member not in self._leaving]
        serving = sum(member.state is State.SERVING for member in staying)
        starting = sum(member.hopeful and member.state is not State.SERVING for member in staying)
        # one that is recruited after the router is there is not on the roster yet
        coming = self.wanted - len(staying) if self._lead is not None else 0
        return Strength(self.wanted, serving, starting + max(coming, 0), len(self._leaving), self._limit)

    @property
    def _limit(self) -> int | None:
        if self.growth is None:
            return len(self.roster.members)
        if self.growth.free is None:
            return None
        return len(self.growth.free) + len(self.roster.members)

    def scale(self, wanted: int) -> None:
        """Have so many servers from now on. Returns at once; `strength` and `faults` say how far it is.

        Raises:
            CapabilityError: these servers are not for us to start or end, or need a router and may have none.
            EngineError: fewer than one, or more than there are devices for.
        """
        growth = self.growth
        if growth is None:
            raise CapabilityError("these servers were not started by this run, or not as servers of one kind")
        if wanted < 1:
            raise EngineError(f"{wanted} servers cannot serve", hint="at least one stays")
        if self._limit is not None and wanted > self._limit:
            raise EngineError(f"{wanted} servers have no devices: there are devices for {self._limit}")
        if wanted > 1 and self.roster.alone and growth.spreader is None:
            raise CapabilityError(
                f"{wanted} servers need a router, but rollout.router.use = 'never'", hint="resume with 'auto'"
            )
        self.wanted = wanted
        self.faults.clear()
        for member in self._surplus(wanted):
            self._leaving[member] = self._run(self._dismiss(member), member.name)
        if self._lead is None:
            self._lead = self._run(self._grow(growth), "growth")

    def _surplus(self, wanted: int) -> Iterator[Member]:
        """Who goes: those that nobody brings back, then those that do not serve yet, then the youngest."""
        staying = [member for member in self.roster.members if member not in self._leaving]
        dead = [member for member in staying if member.given_up]
        alive = [member for member in staying if not member.given_up]
        if alive:
            yield from dead
        ranks = {member: (member.state is State.SERVING, -at) for at, member in enumerate(alive)}
        yield from sorted(alive, key=lambda member: ranks[member])[: max(0, len(alive) - wanted)]

    async def _grow(self, growth: Growth) -> None:
        """Recruit until there are enough."""
        try:
            if self._short and self.roster.alone and growth.spreader is not None:
                await self.crew.lead(growth.spreader)
            while self._short:
                member = growth.recruit()
                self.tell(f"{member.name}: starting, for {self.wanted} servers")
                self.roster.join(member)
                self.keep(enlist(self.crew, member), member.name)
        except EngineError as error:
            self.fault("the router", str(error.args[0]))
        finally:
            self._lead = None

    @property
    def _short(self) -> int:
        """Servers to recruit. Those that leave keep their devices until they have ended."""
        there = [member for member in self.roster.members if not member.given_up and member not in self._leaving]
        short = max(0, self.wanted - len(there))
        free = self.growth.free if self.growth is not None else None
        return short if free is None else min(short, len(free))

    async def _dismiss(self, member: Member) -> None:
        """Let go of a member that is not wanted any more, in whatever state it is."""
        keeper = self._keepers.pop(member.name, None)
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        await self._release(member)
        self.tell(f"{member.name}: ended, {self.wanted} servers are wanted")

    async def refuse(self, member: Member, why: str) -> None:
        """Let go of a newcomer that did not come up. It is not tried again until `scale` is asked again."""
        self._keepers.pop(member.name, None)
        self.fault(member.name, why)
        await self._release(member)

    def fault(self, name: str, why: str) -> None:
        """A newcomer, or what it needs, is not there."""
        self.faults.append(f"{name} did not come up: {why}")
        self.tell(self.faults[-1])

    async def _release(self, member: Member) -> None:
        await self.crew.part(member)
        await member.stop()
        if self.growth is not None:
            self.growth.left(member)
        self._leaving.pop(member, None)
        if self._short and self.growth is not None and self._lead is None and not self.faults:
            self._lead = self._run(self._grow(self.growth), "growth")
