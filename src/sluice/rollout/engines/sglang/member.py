"""One server of a fleet, from before it is started until after it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import httpx

from sluice.config.sglang import SGLangConfig
from sluice.errors import EngineError
from sluice.rollout.engines.sglang.control import Control
from sluice.rollout.engines.sglang.handshake import Server


class Process(Protocol):
    """A program that we started; see `sluice.rollout.process.ManagedProcess`."""

    async def wait(self) -> int: ...

    async def stop(self, grace: float = 10.0) -> None: ...

    def last_error(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers. `process` is None when it was not started here."""

    url: str
    bootstrap_port: int | None = None
    process: Process | None = None


class State(StrEnum):
    """What may be done with a server.

    * away: not started yet, or lost; nothing reaches it.
    * stale: it answers, but may serve nothing: no version was applied, or the last one failed.
    * serving: requests go there.
    """

    AWAY = "away"
    STALE = "stale"
    SERVING = "serving"


@dataclass(slots=True, eq=False)
class Member:
    """One server of a fleet.

    Attributes:
        name: in errors, logs and figures.
        role: regular, prefill or decode.
        shape: servers of equal shape hold equal tensors, so that their checksums can be compared.
        bring: starts it, or finds it.
        owned: started here, and started again when it is lost.
        device: where tensors on their way to it lie; see `Control`.
        devices: accelerators that are its own, as CUDA_VISIBLE_DEVICES names them; empty for none.
        new: it has joined a fleet that runs, and has not served yet.
        life: counts its incarnations; what was sent to an earlier one is lost.
        in_flight: requests that it is known to be busy with.
        returning: it is being brought up, for the first time or after a loss.
        given_up: it is not brought back any more.
        misses: leases in a row that it did not renew.
        doubted: set to have it looked at now.
    """

    name: str
    role: str
    shape: str
    config: SGLangConfig
    bring: Callable[[], Awaitable[Running]]
    owned: bool
    api_key: str = ""
    model: Path | None = None
    device: str = "cpu"
    devices: str = ""
    new: bool = False
    transport: httpx.AsyncBaseTransport | None = None
    state: State = State.AWAY
    life: int = 0
    in_flight: int = 0
    restarts: int = 0
    misses: int = 0
    returning: bool = False
    given_up: bool = False
    doubted: asyncio.Event = field(default_factory=asyncio.Event)
    running: Running | None = None
    _control: Control | None = None

    @property
    def control(self) -> Control:
        if self._control is None:
            raise EngineError(f"{self.name} is not running")
        return self._control

    @property
    def url(self) -> str:
        return self.running.url if self.running else ""

    @property
    def process(self) -> Process | None:
        return self.running.process if self.running else None

    async def start(self) -> Server:
        """Bring the server up and shake hands with it. EngineError when it does not come up."""
        self.running = await self.bring()
        self.life += 1
        self.misses = 0
        self.doubted.clear()
        self._control = Control(
            self.url,
            self.config,
            name=self.name,
            api_key=self.api_key,
            model=self.model,
            device=self.device,
            transport=self.transport,
        )
        server = await self._control.start()
        self.state = State.STALE
        return server

    async def stop(self) -> None:
        """Close the connections, end the process if it is ours. Harmless when repeated."""
        self.state = State.AWAY
        control, self._control = self._control, None
        if control is not None:
            await control.close()
        if self.process is not None:
            await self.process.stop()

    @property
    def hopeful(self) -> bool:
        """Whether it serves, or is being brought back."""
        back = self.returning or self.state is State.AWAY
        return self.state is State.SERVING or (self.owned and not self.given_up and back)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Members that take a version as one: a regular server alone, or every prefill and decode server."""

    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        return self.members[0].name if len(self.members) == 1 else "the prefill/decode set"

    @property
    def present(self) -> list[Member]:
        return [member for member in self.members if member.state is not State.AWAY]

    @property
    def serves(self) -> bool:
        """Whether a request can be answered: one member of every role serves."""
        return self._covers([member for member in self.members if member.state is State.SERVING])

    @property
    def hopeful(self) -> bool:
        """Whether it serves, or will once members that are being brought back are there."""
        return self._covers([member for member in self.members if member.hopeful])

    def _covers(self, members: list[Member]) -> bool:
        return {member.role for member in members} == {member.role for member in self.members}


def units(members: list[Member]) -> list[Unit]:
    """Regular servers are units of their own; prefill and decode servers are one together."""
    pairs = tuple(member for member in members if member.role != "regular")
    return [*(Unit((member,)) for member in members if member.role == "regular"), *([Unit(pairs)] if pairs else [])]
