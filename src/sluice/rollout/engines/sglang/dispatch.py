"""What `Flights` and the owner of the servers say to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sluice.errors import EngineError
from sluice.rollout.engines.base import GenerateRequest
from sluice.rollout.engines.sglang.wire import Wire
from sluice.types import Version


class Dispatch(Protocol):
    """One POST of a request: where it goes, and what becomes of it.

    Attributes:
        wire: to the server, or to the router before it.
        headers: of the request.
        label: what the weights are called now; names the prefix-cache namespace.
        held: the server is paused: an abort has no effect before it goes on.
        lost: the server is gone, or may not be listened to any more.
    """

    wire: Wire
    headers: Mapping[str, str]
    label: str

    @property
    def held(self) -> bool: ...

    @property
    def lost(self) -> bool: ...

    @property
    def server(self) -> str:
        """Name of the server that answers, as far as known."""
        ...

    def heard(self, headers: Mapping[str, str]) -> None:
        """The reply begins: its headers may say who answers."""
        ...

    def cut(self) -> bool:
        """Whether a pause since the dispatch has aborted what the server ran."""
        ...

    def version_of(self, label: str) -> Version:
        """What the server's name of its weights means. LostError for weights that were not applied by us."""
        ...

    async def abort(self, rid: str) -> None: ...

    async def failed(self, error: EngineError) -> None:
        """Raise what the caller is to see, or return when it is to be sent again."""
        ...

    def close(self) -> None:
        """The POST is over, whatever came of it."""
        ...


class Ground(Protocol):
    """Who owns the servers."""

    async def dispatch(self, request: GenerateRequest, failures: int) -> Dispatch:
        """Where the request goes next; it has failed so often in a row."""
        ...


class Slots(asyncio.Semaphore):
    """Requests in flight at once. Their number may change: fewer are fewer as requests end."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._count, self._over = count, 0

    def resize(self, count: int) -> None:
        more, self._count = count - self._count, count
        self._over += max(0, -more)
        for _ in range(more):
            self.release()

    def release(self) -> None:
        if self._over:
            self._over -= 1
        else:
            super().release()


@dataclass(slots=True)
class Traffic:
    """What went over the wire.

    Attributes:
        requests: POSTs by server.
        context_tokens, cached_tokens: of the first POST of each turn; their ratio is the prefix hit rate.
        resumed: turns that were sent again after a cut.
        busy_seconds: with a request under way that nothing held up.
    """

    requests: dict[str, int] = field(default_factory=dict[str, int])
    context_tokens: int = 0
    cached_tokens: int = 0
    resumed: int = 0
    busy_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the context tokens that were found in a cache; 0 before the first turn."""
        return self.cached_tokens / self.context_tokens if self.context_tokens else 0.0
