"""One HTTP call to a server: with a deadline, and with failures that name the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, cast

import httpx

from sluice.errors import EngineError
from sluice.rollout.engines.sglang.lanes import Lanes

BAD_REQUEST, SERVER_ERROR = 400, 500
"""HTTP: from the first on it is the caller's fault, from the second on the server's."""


class RefusedError(EngineError):
    """The server is alive and said no; caught by name where that has a meaning of its own."""

    def __init__(self, message: str, *, hint: str = "", status: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class LostError(EngineError):
    """Nobody answers any more, or not to the end; another server may."""


class Wire:
    """Connections to one server.

    Args:
        url: `http://host:port`.
        api_key: bearer token; empty for none.
        seconds: deadline of a call that names none.
        transport: replaces the network, for tests.
        kind: what is at the URL, for messages.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        seconds: float,
        transport: httpx.AsyncBaseTransport | None = None,
        kind: str = "SGLang server",
    ) -> None:
        self.url = url
        self.where = f"the {kind} at {url}"
        self._seconds = seconds
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,  # ours are over whole calls; httpx only knows the time between two bytes
            transport=transport or Lanes(),  # unbounded: a pause must not queue behind generations
        )

    async def get(self, path: str, *, seconds: float | None = None) -> dict[str, Any]:
        return await self._call("GET", path, None, self._seconds if seconds is None else seconds)

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

    async def answers(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        headers: Mapping[str, str],
        heard: Callable[[Mapping[str, str]], None],
    ) -> AsyncIterator[dict[str, Any]]:
        """POST and yield what comes back: one object, or one per event of a stream. The caller holds the deadline.

        Args:
            path: route.
            body: JSON.
            headers: in addition to those of every call.
            heard: called once with the headers of the reply, before anything is yielded.
        """
        call = f"POST {path}"
        self._refuse_closed(call)
        try:
            async with self._client.stream("POST", path, json=body, headers=dict(headers)) as response:
                heard(response.headers)
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    await response.aread()
                    yield self._read(response, call)
                    return
                async for line in response.aiter_lines():
                    event = line.removeprefix("data:").strip()
                    if line.startswith("data:") and event != "[DONE]":
                        yield self._event(event, call)
        except httpx.HTTPError as error:
            raise self._unreachable(error, call) from error

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        self._refuse_closed(f"{method} {path}")
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.request(method, path, json=body)
        except TimeoutError as error:
            raise EngineError(
                f"{self.where} did not answer {method} {path} within {seconds:g} s",
                hint="see the server's log; rollout.sglang.control_seconds is the deadline",
            ) from error
        except httpx.HTTPError as error:
            raise self._unreachable(error, f"{method} {path}") from error
        return self._read(response, f"{method} {path}")

    def _refuse_closed(self, call: str) -> None:
        """LostError: the server was lost, and these connections with it, after the caller was sent here."""
        if self._client.is_closed:
            raise LostError(f"{self.where} cannot be reached for {call}: its connections were closed")

    def _unreachable(self, error: httpx.HTTPError, call: str) -> LostError:
        return LostError(
            f"{self.where} cannot be reached for {call}: {str(error) or type(error).__name__}",
            hint="is it running, and at that address? see the end of its log",
        )

    def _event(self, text: str, call: str) -> dict[str, Any]:
        try:
            event: Any = json.loads(text)
        except ValueError as error:
            raise EngineError(f"{self.where} sent an event to {call} that is no JSON: {text[:200]}") from error
        reply = cast("dict[str, Any]", event) if isinstance(event, dict) else {}
        if "error" not in reply:
            return reply
        fault: Any = reply["error"]
        code: Any = cast("dict[str, Any]", fault).get("code") if isinstance(fault, dict) else None
        if isinstance(code, int) and BAD_REQUEST <= code < SERVER_ERROR:
            raise self._refused(call, code, fault)
        raise LostError(f"{self.where} broke off its answer to {call}: {str(fault)[:300]}")

    def _read(self, response: httpx.Response, call: str) -> dict[str, Any]:
        try:
            content: Any = response.json() if response.content else {}
        except ValueError:  # some routes answer in plain text
            content = response.text
        reply = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
        if response.is_success and reply.get("success", True):
            return reply
        why: Any = reply.get("message") or reply.get("error") or content or response.reason_phrase
        raise self._refused(call, response.status_code, why)

    def _refused(self, call: str, status: int, why: Any) -> RefusedError:
        if isinstance(why, dict):
            why = cast("dict[str, Any]", why).get("message", why)
        return RefusedError(f"{self.where} refused {call} with status {status}: {str(why)[:500]}", status=status)
