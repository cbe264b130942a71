"""Servers of a fleet on the nodes of a cluster: one actor holds each, and ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import get_node_ip_address

from sluice.errors import EngineError, SluiceError
from sluice.orchestrate.ray.cluster import Room
from sluice.rollout.engines.sglang.hosting import Launches
from sluice.rollout.engines.sglang.launch import HOST
from sluice.rollout.engines.sglang.member import Process, Running

ROOM_SECONDS = 5.0
"""Until it is told that a further server waits for room."""
STOP_SECONDS = 30.0
"""To an actor that is asked to end its server, before it is killed with it."""


class ServerShell:
    """Starts one server on its node and watches over it. Ends with the run that made it, and its server with it."""

    def __init__(self) -> None:
        self._process: Process | None = None

    async def address(self) -> str:
        """Of this node."""
        return get_node_ip_address()

    async def start(self, launcher: Launches[Any], spec: Any) -> tuple[str, int | None]:
        """URL and bootstrap port of a server that answers."""
        running = await launcher.start(spec)
        self._process = running.process
        return running.url, running.bootstrap_port

    async def wait(self) -> int:
        assert self._process is not None  # asked after `start`
        return await self._process.wait()

    async def stop(self, grace: float) -> None:
        if self._process is not None:
            await self._process.stop(grace)

    def last_error(self) -> str:
        return self._process.last_error() if self._process is not None else "it was not started"


ServerActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(ServerShell)


class RemoteProcess:
    """A server's process, seen from the run: see `member.Process`."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self._name = name
        self._last = f"{name} was lost with its node"

    async def wait(self) -> int:
        """Until it ends; the node's or the actor's end is its end too."""
        try:
            code = int(await self._actor.wait.remote())
            self._last = str(await self._actor.last_error.remote())
        except RayActorError as error:
            self._last = f"{self._name} was lost with its actor: {str(error).splitlines()[0]}"
            return -9
        return code

    async def stop(self, grace: float = 10.0) -> None:
        """End it and its actor. Harmless when repeated."""
        try:
            async with asyncio.timeout(grace + STOP_SECONDS):
                await self._actor.stop.remote(grace)
        except (RayActorError, TimeoutError):
            self._last = f"{self._name} did not end when it was asked to"
        ray.kill(self._actor)

    def last_error(self) -> str:
        return self._last


class RayHosts:
    """See `hosting.Hosts`.

    Args:
        room: where the actors go.
        places: numbers of the parts of it that were reserved for servers.
        tell: told where each server is.
    """

    def __init__(self, room: Room, places: Sequence[int], tell: Callable[[str], None]) -> None:
        self._room = room
        self._reserved = list(places)
        self._free = list(places)
        self._tell = tell
        self._numbers: dict[str, int] = {}

    async def start(self, launcher: Launches[Any], spec: Any) -> Running:
        """Start a server where there is room for it, again in its old place after a loss. One for which no room was
        reserved waits until the cluster has some.

        Raises:
            EngineError: it did not come up, or its node was lost meanwhile.
        """
        name = spec if isinstance(spec, str) else spec.name
        number = self._numbers[name] if name in self._numbers else await self._place(name)
        actor = ServerActor.options(**self._room.place(number)).remote()
        try:
            host = HOST if len(ray.nodes()) == 1 else str(await actor.address.remote())
            url, bootstrap_port = await actor.start.remote(launcher.on(host), spec)
        except RayTaskError as error:
            ray.kill(actor)
            cause: Any = error.cause
            raise cause if isinstance(cause, SluiceError) else EngineError(f"{name}: {cause}") from error
        except RayActorError as error:
            raise EngineError(f"{name} was lost while it started: {str(error).splitlines()[0]}") from error
        except asyncio.CancelledError:
            ray.kill(actor)
            raise
        self._tell(f"{name}: at {url}")
        return Running(url, bootstrap_port, RemoteProcess(actor, name))

    def left(self, name: str) -> None:
        """See `hosting.Hosts`. Room that the run began with is kept for the next one."""
        number = self._numbers.pop(name, None)
        if number in self._reserved:
            self._free.append(number)
        elif number is not None:
            self._room.give_back(number)

    async def _place(self, name: str) -> int:
        if self._free:
            number = self._numbers[name] = self._free.pop(0)
            return number
        number = self._numbers[name] = self._room.another(self._reserved[0])
        ready = asyncio.ensure_future(self._room.ready(number))
        try:
            if not (await asyncio.wait({ready}, timeout=ROOM_SECONDS))[0]:
                free = ray.available_resources()
                self._tell(
                    f"{name}: the cluster has no room for it: free are {free.get('CPU', 0):g} CPU cores and "
                    f"{free.get('GPU', 0):g} accelerators; it starts when there is"
                )
            await ready
        finally:
            ready.cancel()
        return number
