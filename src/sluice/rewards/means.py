"""What the components of a rubric share and get from outside."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from sluice.config.sandbox import SandboxConfig
from sluice.errors import RewardError
from sluice.rewards.base import CodeRunner


class Means:
    """Opened on first use, closed with the rubric.

    Args:
        sandbox: makes what runs code of an answer; without it nothing does.
    """

    def __init__(self, sandbox: Callable[[SandboxConfig], CodeRunner] | None = None) -> None:
        self._sandbox = sandbox
        self._client: httpx.AsyncClient | None = None
        self._closers: list[Callable[[], None]] = []

    @property
    def client(self) -> httpx.AsyncClient:
        """The one HTTP client of all components. It never makes a request wait for a connection: callers have limits
        of their own, and deadlines over whole calls."""
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            self._client = httpx.AsyncClient(timeout=None, limits=limits)
        return self._client

    def sandbox(self, config: SandboxConfig) -> CodeRunner:
        """Runs code within these limits. Raises RewardError where there is nothing to run it with."""
        if self._sandbox is None:
            raise RewardError("a reward that runs code needs a sandbox, and this rubric was made without one")
        return self._sandbox(config)

    def at_close(self, closer: Callable[[], None]) -> None:
        """Have something ended with the rubric."""
        self._closers.append(closer)

    async def close(self) -> None:
        """End what was opened."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        while self._closers:
            self._closers.pop()()
