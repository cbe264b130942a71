"""One POST of a fleet: through the router under the episode's key, or straight to the only server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Protocol

from sluice.errors import EngineError
from sluice.rollout.engines.sglang.affinity import Affinity
from sluice.rollout.engines.sglang.member import Member, State
from sluice.rollout.engines.sglang.wire import SERVER_ERROR, LostError, RefusedError, Wire
from sluice.types import Version

KEY_HEADER = "X-SMG-Routing-Key"
"""The router keeps requests with equal values at one server."""
WORKER_HEADER = "x-smg-routed-worker-id"
"""In the router's reply: the URL of the server that answers."""
PATIENCE = 8
"""Failures in a row, without a new token, after which a request is given up."""
BACKOFF_SECONDS = 0.1
"""Before the first time a failed request is sent again; doubled each time, up to 3 s."""


class Fleet(Protocol):
    """What a dispatch needs of the fleet."""

    affinity: Affinity

    def members(self) -> Iterable[Member]: ...

    def doubt(self, member: Member, why: str) -> None:
        """Take it out of routing until it has been looked at and reloaded."""
        ...


class Routed:
    """See `flights.Dispatch`.

    Args:
        fleet: whose servers these are.
        wire: to the router, or to the only server.
        key: the caller's routing key; empty when it does not matter.
        member: who is going to answer, as far as known.
        label: what the weights are called.
        failures: how often in a row this request has failed.
    """

    def __init__(self, fleet: Fleet, wire: Wire, *, key: str, member: Member | None, label: str, failures: int) -> None:
        self.wire = wire
        self.label = label
        self._fleet = fleet
        self._key = key
        self._failures = failures
        self._asked = list(fleet.members())
        present = [each for each in self._asked if each.state is not State.AWAY]
        self._pauses = {each.name: each.control.num_pauses for each in present}
        self._versions = {each.name: each.control.versions for each in present}  # of the life that was asked
        self._lives = {each.name: each.life for each in self._asked}
        self._told: Member | None = None  # by the router
        self._sent = ""
        if key:
            loads = {each.name: each.in_flight for each in fleet.members() if each.state is State.SERVING}
            self._sent = fleet.affinity.place(key, loads)
            home = fleet.affinity.home(key)
            member = next((each for each in fleet.members() if each.name == home), member)
        self.headers: Mapping[str, str] = {KEY_HEADER: self._sent} if self._sent else {}
        self._member: Member | None = None
        self._count(member)

    def _count(self, member: Member | None) -> None:
        if self._member is not None:
            self._member.in_flight -= 1
        self._member = member
        if member is not None:
            member.in_flight += 1

    @property
    def server(self) -> str:
        return self._member.name if self._member else ""

    @property
    def held(self) -> bool:
        return (
            self._member is not None and self._member.state is not State.AWAY and self._member.control.held is not None
        )

    @property
    def lost(self) -> bool:
        member = self._member
        life = self._lives.get(member.name) if member is not None else None
        return member is not None and (member.state is not State.SERVING or member.life != life)

    @property
    def _everybody(self) -> list[Member]:
        """Who is in the fleet, and who has left it since the request was sent."""
        return list(dict.fromkeys([*self._asked, *self._fleet.members()]))

    def heard(self, headers: Mapping[str, str]) -> None:
        url = headers.get(WORKER_HEADER, "")
        found = next((each for each in self._everybody if url and each.url == url), None)
        if found is not None:
            if found.name not in self._lives and found.state is not State.AWAY:  # it has joined since
                self._lives[found.name], self._versions[found.name] = found.life, found.control.versions
            self._told = found
            self._count(found)
            if self._sent:
                self._fleet.affinity.settled(self._key, self._sent, found.name)

    def cut(self) -> bool:
        """Whether the server that answered has been paused meanwhile; any server, when the router did not tell."""
        asked = [self._member] if self._member else self._everybody
        return any(
            each.state is State.AWAY or each.control.num_pauses > self._pauses.get(each.name, -1) for each in asked
        )

    def version_of(self, label: str) -> Version:
        """LostError when weights are named that were not applied to the server by us; it is out of routing then."""
        asked = [self._member.name] if self._member else list(self._versions)
        for name in asked:
            if label in self._versions.get(name, ()):
                return self._versions[name][label]
        why = f"it served weights called {label!r}, which were not applied here: was it restarted?"
        if self._member is not None:
            self._fleet.doubt(self._member, why)
        raise LostError(f"{self.server or 'a server of the fleet'}: {why}")

    async def abort(self, rid: str) -> None:
        """At every server: the router does not say where a request is before it is answered."""
        calls = [
            each.control.wire.post("/abort_request", {"rid": rid})
            for each in self._fleet.members()
            if each.state is not State.AWAY
        ]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, EngineError):
                raise result  # a server that is gone has nothing to abort

    async def failed(self, error: EngineError) -> None:
        """Lost servers and server errors are tried again, elsewhere if the router knows better."""
        again = isinstance(error, LostError) or (isinstance(error, RefusedError) and error.status >= SERVER_ERROR)
        if not again or self._failures >= PATIENCE:
            raise error
        for member in [self._member] if self._told else self._everybody:
            if member is not None:
                member.doubted.set()  # its keeper looks at once
        await asyncio.sleep(min(3.0, BACKOFF_SECONDS * 2**self._failures))

    def close(self) -> None:
        self._count(None)
