"""SGLang servers and a router that exist in memory: what real ones cannot be brought to do at a wanted moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sluice.config.router import RouterConfig
from sluice.config.sglang import SGLangConfig
from sluice.errors import EngineError
from sluice.rollout.engines.sglang.elastic import Growth
from sluice.rollout.engines.sglang.fleet import SGLangFleet
from sluice.rollout.engines.sglang.handshake import ROUTES
from sluice.rollout.engines.sglang.hosting import Here
from sluice.rollout.engines.sglang.member import Member, Running
from sluice.types import Version
from sluice.weights.base import Manifest, TensorInfo

ROUTER = "http://router:1"


@dataclass(eq=False)
class Published:
    """A version that nobody reads, and how many hold it."""

    version: Version
    rows: int = 1000
    holders: int = 1

    @property
    def manifest(self) -> Manifest:
        tensors = {"model.embed_tokens.weight": TensorInfo("float32", (self.rows, 8), "00")}
        return Manifest(self.version, None, f"checksum-of-{self.version}", tensors, 0)

    @property
    def label(self) -> str:
        return f"{self.version}+{self.manifest.checksum[:16]}"

    def tensors(self) -> Any:
        raise NotImplementedError

    def folder(self) -> Path:
        return Path(f"v{self.version}")

    def hold(self) -> None:
        self.holders += 1

    def release(self) -> None:
        self.holders -= 1


@dataclass(eq=False)
class Program:
    """A process that ends when it is told to."""

    over: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: bool = False

    async def wait(self) -> int:
        await self.over.wait()
        return -9

    async def stop(self, grace: float = 10.0) -> None:
        self.stopped = True

    def last_error(self) -> str:
        return "Killed"


@dataclass(eq=False)
class FakeServer:
    """As 0.5.21. A request draws the tokens 100, 101, … counted from its context, `pace` at a time.

    Between two events of a stream it waits for `go`, which is set unless a test clears it.
    """

    url: str
    label: str = "default"
    role: str = "null"
    cumulative: bool = False
    dead: bool = False
    leaving: bool = False
    refuses: bool = False
    checksum: str = ""
    dies_at: str = ""
    waits_at: str = ""
    lingers: bool = False
    proceed: asyncio.Event = field(default_factory=asyncio.Event)
    die: Callable[[], None] = lambda: None
    pace: int = 2
    go: asyncio.Event = field(default_factory=asyncio.Event)
    drawing: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.go.set()

    def named(self, path: str) -> list[dict[str, Any]]:
        return [body for called, body in self.calls if called == path]

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        body = json.loads(request.content) if request.content else {}
        if path == self.dies_at:
            self.die()
        if self.dead:
            raise httpx.ConnectError("connection refused", request=request)
        self.calls.append((path, body))
        if path == self.waits_at:
            await self.proceed.wait()
        if path == "/health":
            return httpx.Response(503 if self.leaving else 200)
        if path == "/openapi.json":
            fields = {"extra_key": {}, "mode": {"enum": ["abort", "in_place", "retract"]}}
            post = {"requestBody": {"content": {"application/json": {"schema": {"properties": fields}}}}}
            extra = ["/begin_weight_update", "/weights_checker"]
            return httpx.Response(200, json={"paths": {route: {"post": post} for route in [*ROUTES, *extra]}})
        if path == "/server_info":
            return httpx.Response(200, json={"version": "fake", "context_length": 64, "disaggregation_mode": self.role})
        if path == "/model_info":
            return httpx.Response(200, json={"weight_version": self.label})
        if path == "/weights_checker":
            return httpx.Response(200, json={"success": True, "per_engine_checksum": self.checksum or self.label})
        if path == "/update_weights_from_disk":
            if self.refuses:
                return httpx.Response(400, json={"success": False, "message": "no such folder"})
            self.label = body["weight_version"]
            if self.lingers:
                await self.proceed.wait()
        if path == "/generate":
            return await self.generate(body)
        return httpx.Response(200, json={"success": True})

    async def generate(self, body: dict[str, Any]) -> httpx.Response:
        start = 100 + len(body["input_ids"])
        ids = list(range(start, start + body["sampling_params"]["max_new_tokens"]))
        if body.get("stream"):
            content = self.stream(ids)
            return httpx.Response(200, content=content, headers={"content-type": "text/event-stream"})
        self.drawing.set()
        await self.go.wait()
        if self.dead:
            raise httpx.ReadError("connection reset")
        return httpx.Response(200, json=self.chunk(ids, ids, last=True))

    async def stream(self, ids: list[int]) -> AsyncIterator[bytes]:
        for end in range(self.pace, len(ids) + self.pace, self.pace):
            end = min(end, len(ids))
            new = ids[:end] if self.cumulative else ids[max(0, (end - 1) // self.pace * self.pace) : end]
            yield b"data: " + json.dumps(self.chunk(new, ids[:end], last=end == len(ids))).encode() + b"\n\n"
            self.drawing.set()
            await self.go.wait()
            if self.dead:
                raise httpx.ReadError("connection reset")
        yield b"data: [DONE]\n\n"

    def chunk(self, new: list[int], so_far: list[int], *, last: bool) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "finish_reason": {"type": "length", "length": len(so_far)} if last else None,
            "weight_version": self.label,
            "completion_tokens": len(so_far),
            "cached_tokens": 1,
            "output_token_logprobs": [[-1.0, token, None] for token in new],
        }
        if last:
            meta["weight_versions"] = [{"version": self.label, "start": 0, "end": len(so_far)}]
        return {"output_ids": new, "meta_info": meta}


@dataclass(eq=False)
class FakeRouter:
    """Sticky by key; a new key goes to the server with the fewest. Knows who was added and removed, in order.

    `kill` ends it; its next `stillborn` starts fail; then it is another one, who knows nobody.
    """

    world: World
    url: str = ROUTER
    workers: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    homes: dict[str, str] = field(default_factory=dict)

    over: asyncio.Event = field(default_factory=asyncio.Event)
    stillborn: int = 0
    life: int = 0

    def kill(self, *, stillborn: int = 0) -> None:
        self.life += 1
        self.stillborn = stillborn
        self.over.set()

    async def start(self) -> None:
        if self.stillborn:
            self.stillborn -= 1
            raise EngineError("the router ended while it started")
        self.over.clear()
        self.workers.clear()

    async def add(self, url: str, *, role: str = "regular", bootstrap_port: int | None = None) -> None:
        self.events.append(f"add {url} serving {self.world.servers[url].label}")
        self.workers.append(url)

    async def remove(self, url: str) -> None:
        if url in self.workers:
            self.events.append(f"remove {url}")
            self.workers.remove(url)

    async def ended(self) -> str:
        await self.over.wait()
        return "it was killed"

    async def close(self) -> None: ...

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.over.is_set():
            raise httpx.ConnectError("connection refused")
        key = request.headers.get("x-smg-routing-key", "")
        if not self.workers:
            return httpx.Response(503, json={"error": "no available workers"})
        if self.homes.get(key) not in self.workers:
            homes = list(self.homes.values())
            self.homes[key] = min(self.workers, key=lambda url: (homes.count(url), self.workers.index(url)))
        url = self.homes[key]
        life = self.life
        try:
            response = await self.world.servers[url](request)
        except httpx.ConnectError:
            return httpx.Response(502, json={"error": "bad gateway"})
        if self.life != life:
            raise httpx.ReadError("connection reset")
        response.headers["x-smg-routed-worker-id"] = url
        return response


class World:
    """A network of one router and servers `a`, `b`, …, and a fleet over them.

    Args:
        names: the servers.
        owned: started by the fleet, which starts a new one under a new URL when one is lost.
        growth: it may have more servers, `s1`, `s2`, … by number, or fewer; one alone has no router at first.
        free: their devices.
    """

    def __init__(
        self, *names: str, owned: bool = True, roles: tuple[str, ...] = (), growth: bool = False,
        free: list[str] | None = None, **config: Any,
    ) -> None:  # fmt: skip
        self.servers: dict[str, FakeServer] = {}
        self.programs: dict[str, Program] = {}
        self.router = FakeRouter(self)
        self.lines: list[str] = []
        self.started = dict.fromkeys(names, 0)
        self.config = SGLangConfig(**{"sync": "disk", "control_seconds": 5, "request_seconds": 20, **config})
        self.owned = owned
        self.ready = asyncio.Event()  # cleared while servers are slow to start
        self.ready.set()
        self.stillborn: set[str] = set()
        transport = httpx.MockTransport(self.handle)
        self.members = [
            Member(name, role, "same", self.config, self.bring(name, role), owned=owned, transport=transport)
            for name, role in zip(names, roles or ["regular"] * len(names), strict=True)
        ]
        alone = growth and len(names) == 1

        def another(number: int, devices: str) -> Member:
            name = f"s{number}"
            self.started[name] = 0
            bring = self.bring(name, "regular")
            return Member(name, "regular", "same", self.config, bring, owned=True, transport=transport, devices=devices)

        self.fleet = SGLangFleet(
            self.members,
            self.config,
            RouterConfig(ceiling=1.5, slack=2),
            spreader=None if alone else lambda: self.router,
            transport=transport,
            progress=self.lines.append,
            growth=Growth(another, lambda: self.router, Here(), len(names), free) if growth else None,
        )

    def bring(self, name: str, role: str) -> Callable[[], Any]:
        async def start() -> Running:
            self.started[name] += 1
            await self.ready.wait()
            if name in self.stillborn:
                raise EngineError(f"{name} ended with exit code 1 while it started")
            url = f"http://{name}:{self.started[name] if self.owned else 1}"
            self.servers.setdefault(url, FakeServer(url, role="null" if role == "regular" else role))
            self.programs[name] = Program()
            return Running(url, None, self.programs[name] if self.owned else None)

        return start

    async def handle(self, request: httpx.Request) -> httpx.Response:
        url = f"{request.url.scheme}://{request.url.host}:{request.url.port}"
        return await (self.router(request) if url == ROUTER else self.servers[url](request))

    def server(self, name: str) -> FakeServer:
        """The present incarnation."""
        return self.servers[f"http://{name}:{self.started[name] if self.owned else 1}"]

    def kill(self, name: str) -> None:
        server = self.server(name)
        server.dead = True
        server.go.set()
        self.programs[name].over.set()
