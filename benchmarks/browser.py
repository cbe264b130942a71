"""A headless Chromium that is driven over its DevTools protocol: for screenshots of pages, and their tests.

It keeps what a page must not have: errors on the console, exceptions, requests beyond the page itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tempfile
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import httpx
from websockets.asyncio.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60.0
"""Deadline of every answer."""


def chromium() -> str:
    """The program. Raises FileNotFoundError when there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(f"no Chromium: none of {', '.join(NAMES)} is installed (apt-get install chromium)")
    return found


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A Chromium with one page; it ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            chromium(), "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run",
            "--disable-gpu", "--disable-background-networking", "--hide-scrollbars", "--force-color-profile=srgb",
            *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank",
        ]  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, limit=1 << 20
        )
        try:
            async with asyncio.timeout(SECONDS):
                port = await _port(process)
            async with connect(await _page_url(port), max_size=None) as socket, Page(socket) as page:
                yield page
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _port(process: asyncio.subprocess.Process) -> int:
    assert process.stderr is not None
    said = ""
    while line := (await process.stderr.readline()).decode(errors="replace"):
        found = re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line)
        if found:
            return int(found[1])
        said += line
    raise RuntimeError(f"Chromium ended before it listened:\n{said}")


async def _page_url(port: int) -> str:
    """The socket of the page that the browser opened."""
    async with httpx.AsyncClient(trust_env=False, timeout=SECONDS) as client, asyncio.timeout(SECONDS):
        while True:
            targets = (await client.get(f"http://127.0.0.1:{port}/json/list")).json()
            found = next((target for target in targets if target["type"] == "page"), None)
            if found is not None:
                return str(found["webSocketDebuggerUrl"])


class Page:
    """One page.

    Attributes:
        problems: what the console said as an error or a warning, and exceptions nobody caught.
        requests: addresses that were asked for.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._last = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self.problems: list[str] = []
        self.requests: list[str] = []

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol. Raises RuntimeError when the browser refuses it."""
        self._last += 1
        future = self._waiting[self._last] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        async with asyncio.timeout(SECONDS):
            return await future

    async def open(self, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load a page at a window size and colour scheme; returns when it is loaded."""
        await self.shape(width=width, height=height, scheme=scheme)
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        async with asyncio.timeout(SECONDS):
            await self._loaded.wait()

    async def shape(self, *, width: int, height: int, scheme: str = "light") -> None:
        """Change the window's size and the preferred colour scheme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def run(self, script: str) -> Any:
        """The value of an expression; a promise is waited for. Raises RuntimeError for an exception in it."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    async def settle(self) -> None:
        """Two frames: what observers and animations do is done."""
        await self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    async def press(self, key: str) -> None:
        """Press and release a key where the focus is."""
        for kind in ("rawKeyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS.get(key, 0)
            )

    async def hover(self, selector: str) -> None:
        """Move the mouse to the middle of the first element that fits."""
        x, y = await self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of what is in the window, or of the whole page."""
        await self.settle()
        answer = await self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole, optimizeForSpeed=False
        )
        return b64decode(answer["data"])

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message)
            if "id" in event:
                future = self._waiting.pop(event["id"])
                if "error" in event:
                    future.set_exception(RuntimeError(event["error"]["message"]))
                else:
                    future.set_result(event["result"])
                continue
            self._note(event["method"], event["params"])

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(
                str(parameters["exceptionDetails"].get("exception", {}).get("description", "exception"))
            )
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(one.get("value", one.get("description"))) for one in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])


_KEYS = {
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}
