"""Where a server of a fleet is started: on this host, or wherever a cluster has room."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from sluice.rollout.engines.sglang.member import Running

S = TypeVar("S", contravariant=True)
"""What a launcher knows a server by."""


class Launches(Protocol[S]):
    """A launcher of servers, such as `sglang.launch.Launcher`."""

    def on(self, host: str) -> Launches[S]:
        """The same for servers that listen on this address, and whose progress nobody is told: it can be sent."""
        ...

    async def start(self, spec: S, /) -> Running:
        """Start a server and wait until it answers. EngineError when it does not."""
        ...


class Hosts(Protocol):
    """Starts servers somewhere."""

    async def start(self, launcher: Launches[Any], spec: Any) -> Running: ...

    def left(self, name: str) -> None:
        """The server of this name is not coming back."""
        ...


class Here:
    """Every server on this host, as a child of this process."""

    async def start(self, launcher: Launches[Any], spec: Any) -> Running:
        return await launcher.start(spec)

    def left(self, name: str) -> None: ...
