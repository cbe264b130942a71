"""What the components of a rubric share and get from outside."""

from __future__ import annotations

import httpx


class Means:
    """Opened on first use, closed with the rubric."""

    def __init__(self) -> None:
        self._client: httpx.AsyncClient | None = None

    @property
    def client(self) -> httpx.AsyncClient:
        """The one HTTP client of all components. It never makes a request wait for a connection: callers have limits
        of their own, and deadlines over whole calls."""
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            self._client = httpx.AsyncClient(timeout=None, limits=limits)
        return self._client

    async def close(self) -> None:
        """End what was opened."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None
