"""HTTP connections by the hundred: httpx's pool, a few connections at a time."""

from __future__ import annotations

import itertools

import httpx

LANES = 64
"""Pools. httpcore looks at every connection of a pool, and for each idle one at all of them again, whenever a request
begins or ends: at 500 connections in one pool that alone takes longer than a GPU needs for the answers."""

IDLE_SECONDS = 2.0
"""An idle connection is closed after this long, before the server does it: SGLang closes its own after 5 s, which is
also httpx's default. A request sent into a connection that is just being closed is lost, and a turn with it."""


class Lanes(httpx.AsyncBaseTransport):
    """Requests go to the pools in turn. No pool ever makes a request wait for a connection."""

    def __init__(self) -> None:
        context = httpx.create_ssl_context()  # one for all: reading the certificates takes a while
        limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS)
        self._pools = [httpx.AsyncHTTPTransport(verify=context, limits=limits) for _ in range(LANES)]
        self._next = itertools.cycle(self._pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self._next).handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()
