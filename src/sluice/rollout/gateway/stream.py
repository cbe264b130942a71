"""Answers on their way to a client: pieces as they are drawn, and the end of a call when its client goes away.

A call and the sending of its pieces are two tasks. Between them stands a `Feed`, which joins the pieces of one kind
that wait: a client that reads slowly costs at most the text of one answer, and delays nobody.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sluice.rollout.chat.base import Delta
from sluice.rollout.gateway.problems import in_stream
from sluice.rollout.session import Choice

_END_SECONDS = 15.0
"""How long a call whose client has gone may take to end."""


class Piece(NamedTuple):
    """Part of answer number `choice`."""

    choice: int
    delta: Delta


Choices: TypeAlias = tuple[Choice, ...]
Call: TypeAlias = Callable[[Callable[[int, Sequence[Delta]], None] | None], Coroutine[Any, Any, Choices]]
"""A session's call, given who is told the pieces."""


class ClientGone(Exception):  # noqa: N818 - nobody is left to be told
    """The client closed the connection; its call was ended and nothing was recorded."""


class Feed:
    """Pieces that wait for their client."""

    def __init__(self) -> None:
        self._waiting: list[Piece] = []
        self.ready = asyncio.Event()

    def tell(self, index: int, deltas: Sequence[Delta]) -> None:
        """Add pieces of one answer."""
        for delta in deltas:
            last = self._waiting[-1] if self._waiting else None
            joins = last is not None and last.choice == index and last.delta.kind == delta.kind != "tool_call"
            if joins and last is not None:
                self._waiting[-1] = Piece(index, Delta(delta.kind, last.delta.text + delta.text))
            else:
                self._waiting.append(Piece(index, delta))
        self.ready.set()

    def take(self) -> list[Piece]:
        """What waits, and nothing waits any more."""
        taken, self._waiting = self._waiting, []
        self.ready.clear()
        return taken


async def until_gone(request: Request) -> None:
    """Returns when the client has closed the connection. The body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, call: Call) -> Choices:
    """The answers of a call that is not streamed.

    Raises:
        ClientGone: nobody waits for them any more.
    """
    working = asyncio.create_task(call(None))
    gone = asyncio.create_task(until_gone(request))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await _drop(working, gone)


class Stream:
    """A call being answered piece by piece. Use `open`."""

    def __init__(self, feed: Feed, working: asyncio.Task[Choices]) -> None:
        self._feed, self._working = feed, working

    @classmethod
    async def open(cls, request: Request, call: Call) -> Stream:
        """Begin the call. Returns with its first piece, or its end: what refuses it is raised here, not in the stream.

        Raises:
            ClientGone: the client left before that.
        """
        feed = Feed()
        working = asyncio.create_task(call(feed.tell))
        ready = asyncio.create_task(feed.ready.wait())
        gone = asyncio.create_task(until_gone(request))
        try:
            await asyncio.wait([working, ready, gone], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()  # raises what refused it
            elif gone.done():
                raise ClientGone
        except BaseException:
            await _drop(working)
            raise
        finally:
            await _drop(ready, gone)
        return cls(feed, working)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What is there, each time something is."""
        while not self._working.done():
            ready = asyncio.create_task(self._feed.ready.wait())
            try:
                await asyncio.wait([ready, self._working], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _drop(ready)
            if taken := self._feed.take():
                yield taken
        if taken := self._feed.take():
            yield taken

    def choices(self) -> Choices:
        """The answers, after the last piece. Raises what the call raised."""
        return self._working.result()

    async def close(self) -> None:
        """End the call if it has not ended."""
        await _drop(self._working)


async def _drop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=_END_SECONDS)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # looked at: whoever needs it has it


def event(data: Mapping[str, Any] | str, name: str = "") -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream(Response):
    """Sends events until they end or the client goes; either way the call behind them is over afterwards.

    Args:
        stream: the call.
        events: the events, made from its pieces.
        failed: what is sent when the call fails on the way.
    """

    media_type = "text/event-stream"

    def __init__(
        self, stream: Stream, events: AsyncIterator[bytes], failed: Callable[[Exception], bytes], request: Request
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._stream, self._events, self._failed, self._request = stream, events, failed, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(until_gone(self._request))
        try:
            await asyncio.wait([sending, gone], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with suppress(OSError):  # the client closed while it was sent to
                    sending.result()
        finally:
            await _drop(sending, gone)
            await self._stream.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for part in self._events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told in the stream
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def failed_event(path: str) -> Callable[[Exception], bytes]:
    """How a failure is told in a stream of this path."""
    return lambda error: event(in_stream(path, error), "error")


Respond: TypeAlias = Callable[[Request], Awaitable[Response]]
