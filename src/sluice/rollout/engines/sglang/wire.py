"""One HTTP call to a server: with a deadline, and with failures that name the server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import httpx

from sluice.errors import EngineError

NO_DEADLINE = float("inf")
"""For calls whose caller holds the deadline."""


class RefusedError(EngineError):
    """The server is alive and said no; caught by name where that has a meaning of its own."""


class Wire:
    """Connections to one server.

    Args:
        url: `http://host:port`.
        api_key: bearer token; empty for none.
        seconds: deadline of a call that names none.
        transport: replaces the network, for tests.
    """

    def __init__(self, url: str, *, api_key: str, seconds: float, transport: httpx.AsyncBaseTransport | None) -> None:
        self.url = url
        self.where = f"the SGLang server at {url}"
        self._seconds = seconds
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,  # ours are over whole calls; httpx only knows the time between two bytes
            limits=httpx.Limits(max_connections=None),  # a pause must not queue behind generations
            transport=transport,
        )

    async def get(self, path: str) -> dict[str, Any]:
        return await self._call("GET", path, None, self._seconds)

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, seconds: float | None = None
    ) -> dict[str, Any]:
        """POST `body` as JSON; `{}` when there is none, which SGLang insists on.

        Returns:
            The object in the reply; empty when the reply is something else.

        Raises:
            RefusedError: an error status, or `"success": false`.
            EngineError: no connection, or no whole reply within `seconds`.
        """
        return await self._call("POST", path, body or {}, self._seconds if seconds is None else seconds)

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(None if seconds == NO_DEADLINE else seconds):
                response = await self._client.request(method, path, json=body)
        except TimeoutError as error:
            raise EngineError(
                f"{self.where} did not answer {method} {path} within {seconds:g} s",
                hint="see the server's log; rollout.sglang.control_seconds is the deadline",
            ) from error
        except httpx.HTTPError as error:
            raise EngineError(
                f"{self.where} cannot be reached for {method} {path}: {str(error) or type(error).__name__}",
                hint="is it running, and at that address? see the end of its log",
            ) from error
        return self._read(response, f"{method} {path}")

    def _read(self, response: httpx.Response, call: str) -> dict[str, Any]:
        try:
            content: Any = response.json() if response.content else {}
        except ValueError:  # some routes answer in plain text
            content = response.text
        reply = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
        if response.is_success and reply.get("success", True):
            return reply
        why: Any = reply.get("message") or reply.get("error") or content or response.reason_phrase
        if isinstance(why, dict):
            why = cast("dict[str, Any]", why).get("message", why)
        raise RefusedError(f"{self.where} refused {call} with status {response.status_code}: {str(why)[:500]}")
