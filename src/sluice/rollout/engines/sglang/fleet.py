"""Several SGLang servers as one engine and one sink: behind the router, or one alone.

generate ──► Flights ──► Routed ──► router ──► a server         (keys by `Affinity`)
apply    ──► unit after unit: hold, load, let go                (a unit is swapped as one)
keepers  ──► one per server: lease, loss, restart, the run's weights, back into routing   (held by `Elastic`)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import httpx

from sluice.config.router import RouterConfig
from sluice.config.sglang import SGLangConfig
from sluice.errors import CapabilityError, EngineError, Unroutable, WeightsError
from sluice.rollout.engines.base import Capabilities, GenerateRequest, Generation, Memory, PauseMode
from sluice.rollout.engines.sglang.affinity import Affinity
from sluice.rollout.engines.sglang.control import vocabulary
from sluice.rollout.engines.sglang.elastic import Elastic, Growth
from sluice.rollout.engines.sglang.flights import Flights
from sluice.rollout.engines.sglang.handshake import Server, common
from sluice.rollout.engines.sglang.member import Member, State
from sluice.rollout.engines.sglang.roster import Fault, Roster, Spreader, all_of
from sluice.rollout.engines.sglang.routed import Routed
from sluice.types import Version
from sluice.weights.base import Published

VACATE_SECONDS = 10.0
"""For a server to give back what it runs; what comes later is sent elsewhere as it was. Updates wait meanwhile."""


class SGLangFleet:
    """Servers that serve one policy together.

    Args:
        members: the servers, not started yet.
        config: what they have in common.
        router: ceiling and slack of the affinity.
        spreader: makes a router; None sends everything to the only member.
        api_key: bearer token of the servers; empty for none.
        transport: replaces the network to the router, for tests.
        progress: told what happens to the fleet, in a line each.
        growth: what it grows by; None when it stays as it is.
    """

    def __init__(
        self,
        members: Sequence[Member],
        config: SGLangConfig,
        router: RouterConfig,
        *,
        spreader: Callable[[], Spreader] | None = None,
        api_key: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
        progress: Callable[[str], None] | None = None,
        growth: Growth | None = None,
    ) -> None:
        self.affinity = Affinity(router.ceiling, router.slack)
        self._config = config
        self._progress = progress
        self._roster = Roster(
            members,
            spreader,
            api_key=api_key,
            seconds=config.control_seconds,
            transport=transport,
            tell=self._tell,
            moved=self._moved,
        )
        self._server: Server | None = None  # what every member can do
        self._target: Published | None = None  # what members should be serving
        self._shut = False  # an update is under way and nobody serves beside it
        self._unrouted = ""  # why there is no router any more
        self._lock = asyncio.Lock()  # one pause, resume, update or admission at a time
        self._settled = asyncio.Condition()
        self._seen = 0.0, time.perf_counter()
        self._room = asyncio.Event()  # cleared while the devices are somebody else's
        self._room.set()
        self.elastic = Elastic(self, self._roster, growth, self._tell)
        self._flights = Flights(
            self, name=self.name, seconds=config.request_seconds, slots=config.max_concurrent * len(members)
        )

    @property
    def name(self) -> str:
        members = self._roster.members
        return f"sglang x {len(members)}" if len(members) > 1 else members[0].name

    @property
    def version(self) -> Version | None:
        """What members should be serving; None while none of them does."""
        if self._target is None or self._flights.failed or not self._roster.serves:
            return None
        return self._target.manifest.version

    def members(self) -> Iterable[Member]:
        return self._roster.members

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> Capabilities:
        """Start or find every server and the router, and shake hands. Harmless when repeated.

        Raises:
            EngineError: one of them did not come up; those that did are ended again.
        """
        if self._server is None:
            try:
                started = await all_of([member.start() for member in self.members()])
                await self._roster.start_router()
                self._server = common(started, self.name)
            except BaseException:
                await self.close()
                raise
            self.elastic.begin()
            if self._roster.wire is not None:
                self.elastic.keep(self._keep_router(), "router")
        return self._server.capabilities

    async def close(self) -> None:
        """End what was started here, in every state; requests in flight get Unroutable."""
        await self.elastic.close()
        self._server = None
        self._flights.fail("the engine was closed")
        target, self._target = self._target, None
        if target is not None:
            target.release()
        await asyncio.gather(self._roster.close_router(), *(member.stop() for member in self.members()))

    def fail(self, why: str) -> None:
        """See `elastic.Crew`."""
        self._flights.fail(why)

    async def _keep_router(self) -> None:
        """A router that ended, while it started too, is started again, as often as an engine, and told who serves."""
        roster = self._roster
        why = await roster.router_ended()
        for _ in range(self._config.restarts):
            self._tell(f"router: lost: {why}")
            await roster.close_router()
            await self._settle()  # requests wait, instead of running out of patience
            try:
                async with self._lock:
                    await roster.start_router()
                    await self._settle()
            except EngineError as error:
                why = str(error.args[0])
                continue
            self._tell("router: serving again")
            why = await roster.router_ended()
        self._unrouted = f"the router ended too often: {why}"
        await self._settle()

    # ── generation ──────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one continuation, at any server; waits while the engine is paused or a server is brought back.

        Raises:
            EngineError: the request cannot be served as it is, or failed too often, or missed its deadline.
            Unroutable: no server may serve: no version was applied yet, or all are lost.
        """
        if self._server is None:
            raise EngineError(f"{self.name} is not started, or closed", hint="await start() first")
        rows = vocabulary(self._target.manifest if self._target else None)
        return await self._flights.generate(request, self._server, rows)

    async def abort(self, rids: Sequence[str] | None = None) -> None:
        self._flights.abort(rids)

    async def release(self, routing_key: str) -> None:
        """The episode has ended: forget where it was."""
        self.affinity.forget(routing_key)

    async def dispatch(self, request: GenerateRequest, failures: int) -> Routed:
        """For `Flights`."""
        router, members = self._roster.wire, self._roster.members
        only = members[0] if len(members) == 1 else None
        if router is None and members[0].state is State.AWAY:
            raise Unroutable(f"{members[0].name} is not running")
        return Routed(
            self,
            router or members[0].control.wire,
            key=request.routing_key if router else "",
            member=only,
            label=next((member.control.label for member in members if member.state is State.SERVING), ""),
            failures=failures,
        )

    # ── control ─────────────────────────────────────────────────────────────────────────────────────────

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None:
        """Stop drawing tokens everywhere; see `PauseMode`. A server that dies meanwhile is lost, not an error.

        Raises:
            CapabilityError: a server does not know the mode.
        """
        async with self._lock:
            if not self._flights.failed:
                self._flights.ready()
            await self._roster.pause(mode)
            await self._settle()
            if mode is PauseMode.ABORT:
                self._flights.abort()

    async def resume(self) -> None:
        """Go on drawing tokens, where a version may be served."""
        async with self._lock:
            await self._roster.resume()
            await self._settle()

    async def drain(self) -> None:
        """See `Yielding.drain`. Turns that run come back as tokens, and wait here."""
        async with self._lock:
            if not self._flights.failed:
                self._flights.ready()
            await self._roster.pause(PauseMode.RECOMPUTE, empty=True)
            await self._settle()

    async def release_memory(self) -> None:
        """See `Yielding.release_memory`. A server that dies from now on is started again when memory is taken back."""
        server = self._server
        if server is None or not server.capabilities.memory_release:
            raise CapabilityError(
                f"{self.name} cannot give up its memory",
                hint="servers that a run starts with placement.colocate can; start others with --enable-memory-saver",
            )
        await self.drain()
        async with self._lock:
            self._room.clear()
            await self._roster.release_memory()
            await self._settle()

    async def resume_memory(self, part: Memory) -> None:
        """See `Yielding.resume_memory`."""
        async with self._lock:
            await self._roster.resume_memory(part)
            self._room.set()
            await self._settle()

    async def apply(self, published: Published) -> None:
        """Swap in a version, unit after unit, so that others keep serving; all at once when nothing is in flight.

        A unit that does not take it, nor on a second try, is out of routing until a later one is taken, and
        its weights agree by checksum with those of its like. A lost server takes the version when it is back.

        Raises:
            WeightsError, EngineError: no unit took the version, and none will by itself.
        """
        roster = self._roster
        published.hold()
        async with self._lock:
            old, self._target = self._target, published
            self._shut = sum(unit.serves for unit in roster.units) <= 1
            await self._settle()
            try:
                faults = await self._apply(published)
            finally:
                self._shut = False
                if old is not None:
                    old.release()
                await self._settle()
        if not roster.serves:
            if faults and not roster.hopeful:
                raise next((fault for fault in faults if isinstance(fault, WeightsError)), faults[0])
            await self._wait_until_served()

    async def _apply(self, published: Published) -> list[Fault]:
        roster = self._roster
        if not self._flights.busy:
            found = await all_of([roster.swap(unit, unit.present, published) for unit in roster.units])
        else:
            found = [await roster.swap(unit, unit.present, published) for unit in roster.units]
        return [fault for faults in found for fault in faults]

    async def _wait_until_served(self) -> None:
        seconds = self._config.start_seconds
        try:
            async with asyncio.timeout(seconds), self._settled:
                await self._settled.wait_for(lambda: self._roster.serves or not self._roster.hopeful)
        except TimeoutError as error:
            raise EngineError(f"no server of {self.name} was back within {seconds:g} s") from error
        self._flights.refuse_if_failed()

    async def _settle(self) -> None:
        """Bring the gate to where the servers are."""
        roster = self._roster
        if self._target is not None and self._server is not None:
            if self._unrouted:
                self._flights.fail(self._unrouted)
            elif not roster.hopeful and not self._shut:
                self._flights.fail("; ".join(why_not(member) for member in roster.members))
            elif roster.mode is None and not self._shut and roster.serves and roster.routed:
                self._flights.open()
            else:
                self._flights.ready()
        async with self._settled:
            self._settled.notify_all()

    # ── keepers ─────────────────────────────────────────────────────────────────────────────────────────

    def doubt(self, member: Member, why: str) -> None:
        """Have a member looked at now."""
        self._tell(f"{member.name}: {why}")
        member.doubted.set()

    async def lose(self, member: Member, why: str) -> None:
        """Take a member out of routing; what it was busy with is sent elsewhere."""
        self._tell(f"{member.name}: lost: {why}")
        await self._roster.unroute(member, State.AWAY)
        await self._settle()

    async def room(self) -> None:
        """Wait until servers may be started: not while their devices are somebody else's."""
        await self._room.wait()

    async def admit(self, member: Member) -> None:
        """Give a member that is back the weights of the run, and route to it."""
        async with self._lock:
            if self._target is not None:
                unit = next(unit for unit in self._roster.units if member in unit.members)
                faults = await self._roster.swap(unit, [member], self._target)
                if faults:
                    raise faults[0]
            again, member.new = "" if member.new else " again", False
            self._resize()
            await self._settle()
        self._tell(f"{member.name}: serving{again}")

    async def lead(self, make: Callable[[], Spreader]) -> None:
        """See `elastic.Crew`."""
        async with self._lock:
            await self._roster.lead(make)
            await self._settle()
        self.elastic.keep(self._keep_router(), "router")

    async def part(self, member: Member) -> None:
        """See `elastic.Crew`. Turns that end while the router lets go of it end there; the others are cut then."""
        await self.vacate(member)
        async with self._lock:
            await self._roster.unroute(member, State.AWAY)
            self._roster.leave(member)
            self._resize()
            await self._settle()

    async def vacate(self, member: Member) -> None:
        """Bring back the turns that a member runs, tokens included, so far as it answers; at others they go on."""
        if member.state is not State.SERVING:
            return
        await self._roster.withdraw(member)
        async with self._lock:
            await self._cut(member)
            if member.state is State.SERVING:
                await self._roster.unroute(member, State.AWAY)
            await self._settle()

    async def _cut(self, member: Member) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(VACATE_SECONDS):
                await self._roster.vacate(member)
                while member.in_flight and member.state is State.SERVING:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)

    def _resize(self) -> None:
        there = sum(not member.new for member in self.members())
        self._flights.slots.resize(self._config.max_concurrent * max(there, 1))

    async def refuse(self, member: Member, why: str) -> None:
        await self.elastic.refuse(member, why)

    async def give_up(self, member: Member, why: str) -> None:
        """A member is not started again."""
        member.given_up = True
        self._tell(f"{member.name}: given up after {member.restarts} restarts: {why}")
        await self._settle()

    def _moved(self, member: Member) -> None:
        self.affinity.evict(member.name)
        self._flights.wake()

    def _tell(self, line: str) -> None:
        if self._progress is not None:
            self._progress(line)

    def figures(self) -> dict[str, float]:
        """Counters since the start, and the share of the time since the last call in which no turn was under way."""
        self._flights.count_time()
        traffic, now = self._flights.traffic, time.perf_counter()
        (busy, since), self._seen = self._seen, (traffic.busy_seconds, now)
        return {
            "engine/idle_share": 1.0 - (traffic.busy_seconds - busy) / max(now - since, 1e-9),
            "engine/prefix_hit_rate": traffic.hit_rate,
            "engine/rekeyed": float(self.affinity.rekeyed),
            "engine/servers": float(self.elastic.strength.serving),
            "engine/restarts": float(sum(member.restarts for member in self.members())),
            "engine/resumed_turns": float(traffic.resumed),
            **{f"engine/requests/{name}": float(count) for name, count in sorted(traffic.requests.items())},
        }


def why_not(member: Member) -> str:
    """Why a member serves nothing."""
    if member.state is State.AWAY:
        return f"{member.name} is lost"
    return f"{member.name}: {member.control.unroutable or member.state}"
