"""A real HTTP server for tests that behaves as it is told, well or badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass
class Answering:
    """Answers each request with the next of `script`, the last of them again and again.

    An entry is a value (sent as JSON with status 200), bytes (sent as they are, as the body), a status with a body and
    headers, or a word: `close` cuts the connection, `cut` cuts it in the middle of the body, `hang` never answers.
    """

    script: list[Any] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    open: int = 0
    most_open: int = 0
    hold: asyncio.Event | None = None

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                first, *lines = head.strip().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.asked.append(Asked(first.split()[1], headers, json.loads(body)))
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                if self.hold is not None:
                    await self.hold.wait()
                if answer == "hang":
                    await asyncio.Event().wait()
                self.open -= 1
                if answer == "close":
                    return
                writer.write(self._bytes(answer))
                await writer.drain()
                if answer == "cut":
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    def _bytes(self, answer: Any) -> bytes:
        status, content, headers = 200, b"", {}
        if answer == "cut":
            return b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"
        if isinstance(answer, tuple):
            status, answer, headers = answer
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {status} So\r\n{lines}Content-Length: {len(content)}\r\n\r\n".encode() + content


@asynccontextmanager
async def answering(*script: Any) -> AsyncIterator[Answering]:
    """The server on a free port, for the block."""
    it = Answering(list(script))
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        with contextlib.suppress(asyncio.CancelledError):  # asyncio.streams of 3.11 complains about it
            await it.handle(reader, writer)
        connections.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    it.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield it
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
