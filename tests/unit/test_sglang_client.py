"""The SGLang client against servers that real ones cannot be made into: old, broken or slow ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from sluice.config.rollout import SGLangConfig
from sluice.errors import CapabilityError, ConfigError, EngineError, Unroutable, WeightsError
from sluice.rollout.engines.base import Finish, GenerateRequest, Generation, PauseMode
from sluice.rollout.engines.sglang import SGLangEngine
from sluice.rollout.engines.sglang.handshake import ROUTES
from sluice.rollout.engines.sglang.lanes import IDLE_SECONDS
from sluice.rollout.engines.sglang.wire import LostError, Wire
from sluice.types import SamplingParams, Version, VersionSpan
from sluice.weights.base import Manifest, TensorInfo

URL = "http://127.0.0.1:30000"


@dataclass
class OldServer:
    """As 0.5.17: no bracket, no spans, pauses only by aborting.

    A request draws the tokens 10, 11, … counted from its context; after `burst` of them it waits to be aborted,
    unless it has as many as it wanted.
    """

    burst: int = 3
    label: str = "default"
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    missing: frozenset[str] = frozenset()
    meta: dict[str, Any] = field(default_factory=dict)
    deaf_to_aborts: int = 0
    stuck: frozenset[str] = frozenset()
    aborts: dict[str, asyncio.Event] = field(default_factory=dict)
    running: asyncio.Event = field(default_factory=asyncio.Event)

    def named(self, path: str) -> list[dict[str, Any]]:
        return [body for called, body in self.calls if called == path]

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        body = json.loads(request.content) if request.content else {}
        self.calls.append((path, body))
        if path in self.stuck:
            await asyncio.Event().wait()
        if path == "/openapi.json":
            return httpx.Response(200, json={"paths": {route: {} for route in ROUTES if route not in self.missing}})
        if path == "/server_info":
            return httpx.Response(200, json={"version": "0.5.17", "context_length": 64})
        if path == "/model_info":
            return httpx.Response(200, json={"weight_version": self.label})
        if path == "/update_weights_from_disk":
            self.label = body["weight_version"]
        if path == "/pause_generation":
            assert body == {"mode": "abort"}
            for event in self.aborts.values():
                event.set()
        if path == "/abort_request":
            self.deaf_to_aborts -= 1
            if self.deaf_to_aborts < 0:
                self.aborts[body["rid"]].set()
        if path == "/generate":
            return await self.generate(body)
        return httpx.Response(200, json={"success": True})

    async def generate(self, body: dict[str, Any]) -> httpx.Response:
        label, wanted = self.label, body["sampling_params"]["max_new_tokens"]
        count = min(wanted, self.burst)
        reason = {"type": "length", "length": wanted}
        if count < wanted:
            event = self.aborts[body["rid"]] = asyncio.Event()
            self.running.set()
            await event.wait()
            reason = {"type": "abort", "message": "aborted"}
        ids = list(range(10 + len(body["input_ids"]), 10 + len(body["input_ids"]) + count))
        meta = {
            "finish_reason": reason, "weight_version": label, "output_token_logprobs": [[-1.0, i, None] for i in ids]
        } | self.meta  # fmt: skip
        return httpx.Response(200, json={"output_ids": ids, "meta_info": meta})


@dataclass
class Folder:
    """A published version that nobody reads."""

    version: Version
    rows: int = 64

    @property
    def manifest(self) -> Manifest:
        tensors = {"model.embed_tokens.weight": TensorInfo("float32", (self.rows, 8), "00")}
        return Manifest(self.version, None, f"checksum-of-{self.version}", tensors, 0)

    def tensors(self) -> Any:
        raise NotImplementedError

    def folder(self) -> Path:
        return Path("published")


def request(rid: str = "r", **sampling: Any) -> GenerateRequest:
    return GenerateRequest(rid, np.array([1, 2], np.int32), SamplingParams(**{"max_new_tokens": 8, **sampling}))


def client(server: Any, **config: Any) -> SGLangEngine:
    return SGLangEngine(
        URL, SGLangConfig(**{"sync": "disk", "control_seconds": 5, **config}), transport=httpx.MockTransport(server)
    )


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


async def cut_by_an_update(server: OldServer, **sampling: Any) -> Generation:
    """Activate 0, cut a running request by activating 1 once it has drawn something, let it end."""
    engine = client(server)
    await engine.start()
    await engine.apply(Folder(Version(0)))
    got = asyncio.create_task(engine.generate(request(**sampling)))
    await server.running.wait()
    server.burst = 100
    await engine.apply(Folder(Version(1)))
    assert server.calls[-1][0] in {"/continue_generation", "/generate"}
    try:
        return await got
    finally:
        await engine.close()


def test_an_old_servers_abort_at_our_pause_is_not_the_end_of_the_turn() -> None:
    async def main() -> None:
        server = OldServer()
        got = await cut_by_an_update(server)
        assert got.finish is Finish.LENGTH
        assert got.ids.tolist() == list(range(12, 20))
        assert got.spans == (VersionSpan(0, 3, Version(0)), VersionSpan(3, 8, Version(1)))
        probe, first, second = server.named("/generate")
        assert "rid" not in probe
        assert first["input_ids"] == [1, 2]
        assert second["input_ids"] == [1, 2, 12, 13, 14]
        assert second["sampling_params"]["max_new_tokens"] == 5
        assert not server.named("/begin_weight_update")

    run(main())


def test_a_turn_with_stop_strings_starts_over_because_one_may_lie_across_the_cut() -> None:
    async def main() -> None:
        server = OldServer()
        got = await cut_by_an_update(server, stop=("\n\n",))
        assert got.ids.tolist() == list(range(12, 20))
        assert got.spans == (VersionSpan(0, 8, Version(1)),)
        assert server.named("/generate")[-1]["input_ids"] == [1, 2]

    run(main())


def test_an_old_server_cannot_keep_the_cache_over_a_pause() -> None:
    async def main() -> None:
        engine = client(OldServer())
        found = await engine.start()
        assert found.pause_modes == {PauseMode.RECOMPUTE, PauseMode.ABORT}
        assert not found.version_spans
        assert not found.bracketed_updates
        with pytest.raises(CapabilityError, match="it can with abort, recompute"):
            await engine.pause(PauseMode.KEEP_KV)

    run(main())


def test_an_abort_that_overtook_its_request_is_sent_again() -> None:
    async def main() -> None:
        server = OldServer(deaf_to_aborts=1)
        engine = client(server)
        await engine.start()
        await engine.apply(Folder(Version(0)))
        got = asyncio.create_task(engine.generate(request()))
        await server.running.wait()
        await engine.abort(["r"])
        assert (await got).finish is Finish.ABORT
        assert len(server.named("/abort_request")) == 2

    run(main())


@pytest.mark.parametrize(
    "server, says",
    [
        (OldServer(missing=frozenset({"/pause_generation"})), "lacks /pause_generation"),
        (OldServer(meta={"output_token_logprobs": []}), "returns no log-probs"),
        (lambda _: httpx.Response(404, json={"detail": "Not Found"}), "does not describe its routes"),
    ],
)
def test_what_a_server_lacks_is_told_at_the_handshake(server: Any, says: str) -> None:
    with pytest.raises(CapabilityError, match=says) as caught:
        asyncio.run(client(server).start())
    assert caught.value.hint


def test_tensors_are_not_offered_to_another_machine() -> None:
    engine = SGLangEngine("http://192.0.2.1:30000", SGLangConfig())
    with pytest.raises(CapabilityError, match="is not on this machine") as caught:
        asyncio.run(engine.start())
    assert "sync=disk" in caught.value.hint


def test_the_servers_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def server(request: httpx.Request) -> httpx.Response:
        return httpx.Response(401, json={"error": f"not {request.headers['authorization']}"})

    with pytest.raises(ConfigError, match="names SGLANG_TOKEN"):
        asyncio.run(client(server, api_key_env="SGLANG_TOKEN").start())
    monkeypatch.setenv("SGLANG_TOKEN", "secret")
    with pytest.raises(EngineError, match="status 401: not Bearer secret"):
        asyncio.run(client(server, api_key_env="SGLANG_TOKEN").start())


def test_a_server_that_dies_or_hangs_is_named_with_what_it_did_last() -> None:
    async def main() -> None:
        server = OldServer()
        engine = client(server, control_seconds=0.2)
        await engine.start()
        await engine.apply(Folder(Version(0)))
        server.stuck = frozenset({"/update_weights_from_disk"})
        waits = asyncio.create_task(engine.generate(request()))
        await server.running.wait()
        with pytest.raises(EngineError, match=rf"{URL} did not answer POST /update_weights_from_disk within 0\.2 s"):
            await engine.apply(Folder(Version(1)))
        assert engine.version is None
        with pytest.raises(Unroutable, match=r"version 1\.0 could not be applied"):
            await waits
        server.stuck = frozenset()
        await engine.apply(Folder(Version(1)))
        server.burst = 100
        assert (await engine.generate(request())).spans == (VersionSpan(0, 8, Version(1)),)

        def dead(request: httpx.Request) -> httpx.Response:
            raise httpx.ReadError("connection reset", request=request)

        server.generate = dead  # type: ignore[method-assign]
        with pytest.raises(EngineError, match=rf"{URL} cannot be reached for POST /generate"):
            await engine.generate(request())

    run(main())


def test_connections_that_were_closed_with_their_server_are_a_lost_server() -> None:
    """A request that is about to be sent to a router when that ends is sent again, so it must be told LostError."""

    async def main() -> None:
        wire = Wire("http://127.0.0.1:1", api_key="", seconds=1.0)
        await wire.close()
        with pytest.raises(LostError, match=r"cannot be reached for POST /generate: its connections were closed"):
            await anext(wire.answers("/generate", {}, headers={}, heard=lambda _: None))
        with pytest.raises(LostError, match=r"GET /model_info: its connections were closed"):
            await wire.get("/model_info")

    run(main())


def test_a_reply_that_cannot_be_trusted_is_an_error() -> None:
    async def main() -> None:
        server = OldServer(burst=100)
        engine = client(server)
        await engine.start()
        await engine.apply(Folder(Version(0)))
        server.meta = {"finish_reason": {"type": "stop", "matched": "NaN happened"}}
        with pytest.raises(EngineError, match="are NaN"):
            await engine.generate(request())
        server.meta = {"output_token_logprobs": [[-1.0, 12, None]]}
        with pytest.raises(EngineError, match="8 tokens and the log-probs"):
            await engine.generate(request())

    run(main())


def test_a_version_of_another_shape_is_refused_before_the_server_sees_it() -> None:
    async def main() -> None:
        server = OldServer(burst=100)
        engine = client(server)
        await engine.start()
        await engine.apply(Folder(Version(0)))
        with pytest.raises(WeightsError, match=r"does not have the tensors of version 0\.0"):
            await engine.apply(Folder(Version(1), rows=65))
        assert len(server.named("/update_weights_from_disk")) == 1
        with pytest.raises(Unroutable):
            await engine.generate(request())
        await engine.apply(Folder(Version(2)))
        assert engine.version == Version(2)

    run(main())


def test_idle_connections_are_given_up_before_a_server_closes_them() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    assert uvicorn.Config(app).timeout_keep_alive / 2 >= IDLE_SECONDS
