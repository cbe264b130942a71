"""The real router, smg, before small servers that answer like SGLang.

Needs the engine's own environment: sluice engines install sglang --cpu. A router starts in a second or two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from sluice.config.router import RouterConfig
from sluice.errors import CapabilityError, EngineError
from sluice.rollout.process import ManagedProcess, start_on_port
from sluice.rollout.router import Router
from sluice_engine import cpu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WORKER = Path(__file__).parents[1] / "routed_worker.py"
PROMPT = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}}


class Worker:
    def __init__(self, name: str, url: str, process: ManagedProcess) -> None:
        self.name, self.url, self.process = name, url, process

    async def seen(self) -> list[dict[str, Any]]:
        async with httpx.AsyncClient(timeout=30) as client:
            return (await client.get(f"{self.url}/seen")).json()

    async def tell(self, what: str) -> None:
        async with httpx.AsyncClient(timeout=30) as client:
            (await client.post(f"{self.url}/{what}")).raise_for_status()


class Rig:
    """A router, and a client of it."""

    def __init__(self, router: Router, client: httpx.AsyncClient, workers: list[Worker], folder: Path) -> None:
        self.router, self.client, self.workers, self.folder = router, client, workers, folder

    async def ask(self, key: str = "", **fields: Any) -> httpx.Response:
        headers = {"X-SMG-Routing-Key": key} if key else {}
        return await self.client.post(f"{self.router.url}/generate", json={**PROMPT, **fields}, headers=headers)

    async def name(self, key: str, **fields: Any) -> str:
        reply = await self.ask(key, **fields)
        assert reply.status_code == 200, reply.text
        return reply.json()["meta_info"]["name"]


async def start_worker(name: str, folder: Path, role: str = "null") -> Worker:
    async def begin(port: int) -> Worker:
        url = f"http://127.0.0.1:{port}"

        async def ready() -> bool:
            async with httpx.AsyncClient(timeout=5) as client:
                try:
                    return (await client.get(f"{url}/health")).is_success
                except httpx.TransportError:
                    return False

        process = await ManagedProcess.start(
            name, [sys.executable, str(WORKER), str(port), name, role], env=dict(os.environ),
            log_path=folder / f"{name}.log", ready=ready, seconds=60,
        )  # fmt: skip
        return Worker(name, url, process)

    return await start_on_port(begin)


@contextlib.asynccontextmanager
async def rig(folder: Path, workers: int = 2, **config: Any) -> AsyncIterator[Rig]:
    async with contextlib.AsyncExitStack() as stack:
        router = Router(RouterConfig(**config), python=cpu.interpreter(), log_path=folder / "router.log")
        stack.push_async_callback(router.close)
        await router.start()
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=60))
        made: list[Worker] = []
        for number in range(workers):
            worker = await start_worker(f"w{number}", folder)
            stack.push_async_callback(worker.process.stop, 1.0)
            await router.add(worker.url)
            made.append(worker)
        yield Rig(router, client, made, folder)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await holds():  # noqa: ASYNC110 - it looks at another process
            await asyncio.sleep(0.05)


def run(coroutine: Any) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 170))


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
def test_a_key_stays_at_one_worker_and_keys_spread(tmp_path: Path, policy: str) -> None:
    async def check() -> None:
        async with rig(tmp_path, workers=3, policy=policy) as it:
            homes: dict[str, set[str]] = {}
            for _ in range(4):
                names = await asyncio.gather(*(it.name(f"e{key}/0") for key in range(24)))
                for key, name in enumerate(names):
                    homes.setdefault(f"e{key}/0", set()).add(name)
            assert all(len(names) == 1 for names in homes.values())
            assert set().union(*homes.values()) == {"w0", "w1", "w2"}

    run(check())


@pytest.mark.parametrize("policy", ["cache_aware", "power_of_two", "least_load", "round_robin", "random"])
def test_the_other_policies_start_and_answer(tmp_path: Path, policy: str) -> None:
    thresholds = {"cache_threshold": 0.5, "balance_abs_threshold": 4, "balance_rel_threshold": 1.5}

    async def check() -> None:
        async with rig(tmp_path, workers=1, policy=policy, **thresholds) as it:
            assert await it.name("e0/0") == "w0"

    run(check())


def test_fields_and_headers_pass_both_ways(tmp_path: Path) -> None:
    fields = {
        "rid": "r1", "return_routed_experts": True, "return_logprob": True, "session_id": "s", "extra_key": "v3",
        "unknown_to_all": {"a": [1, None]},
    }  # fmt: skip

    async def check() -> None:
        async with rig(tmp_path, workers=1) as it:
            reply = await it.ask("e1/0", **fields)
            worker = it.workers[0]
            assert reply.headers["x-smg-routed-worker-id"] == worker.url
            answer = reply.json()
            assert answer["meta_info"]["weight_versions"] == [["v0", 0, 1], ["v1", 1, 2]]
            assert answer["meta_info"]["routed_experts"] == "AAEC"
            assert {name: answer["seen"].get(name) for name in fields} == fields
            assert answer["seen"]["input_ids"] == [1, 2, 3]
            [seen] = await worker.seen()
            assert seen["headers"]["x-smg-routing-key"] == "e1/0"

    run(check())


def test_events_are_not_buffered(tmp_path: Path) -> None:
    """The second event is made only after the first has arrived here."""

    async def check() -> None:
        async with rig(tmp_path, workers=1) as it:
            request = {**PROMPT, "stream": True}
            async with it.client.stream("POST", f"{it.router.url}/generate", json=request) as reply:
                assert reply.headers["x-smg-routed-worker-id"] == it.workers[0].url
                lines = reply.aiter_lines()
                first = await anext(line async for line in lines if line.startswith("data:"))
                assert json.loads(first[5:])["output_ids"] == [1, 2]
                await it.workers[0].tell("release")
                rest = [line async for line in lines if line.startswith("data:")]
                assert rest[-1] == "data: [DONE]"

    run(check())


def test_a_worker_that_dies_is_replaced_by_another_or_told(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as it:
            home = await it.name("e0/0")
            reply = await it.ask("e0/0", die=[home])
            # sent once more, to the other one, which answers
            assert reply.status_code == 200
            assert reply.json()["meta_info"]["name"] != home
            other = await it.name("e0/0")
            assert other != home
            # nobody is left: an error of the router, in time
            reply = await it.ask("e0/0", die=[other])
            assert reply.status_code in (500, 502, 503)
            reply = await it.ask("e0/0")
            assert reply.status_code in (500, 502, 503)

    run(check())


def test_a_worker_that_dies_mid_stream_is_told_in_an_event(tmp_path: Path) -> None:
    """And `[DONE]` follows nevertheless: the error event is what tells."""

    async def check() -> None:
        async with rig(tmp_path, workers=1) as it:
            request = {**PROMPT, "stream": True, "die_later": ["w0"]}
            events: list[str] = []
            async with it.client.stream("POST", f"{it.router.url}/generate", json=request) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data:") and not events:
                        with contextlib.suppress(httpx.RemoteProtocolError):  # it may die before it answers this
                            await it.workers[0].tell("release")
                    events += [line] if line.startswith("data:") else []
            assert len(events) == 3
            assert json.loads(events[1][5:])["error"]["type"] == "stream_error"
            assert events[2] == "data: [DONE]"

    run(check())


def test_a_failing_worker_is_tried_elsewhere(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as it:
            home = await it.name("e0/0")
            reply = await it.ask("e0/0", fail=[home])
            assert reply.status_code == 200
            assert reply.json()["meta_info"]["name"] != home
            assert await it.name("e0/0") == home  # and it is still there

            reply = await it.ask("e0/0", fail=["w0", "w1"])
            assert reply.status_code == 500
            tries = sum([len(await worker.seen()) for worker in it.workers])
            assert tries <= 3 + 3 + 1  # bounded

    run(check())


def test_a_worker_that_looks_dead_stays(tmp_path: Path) -> None:
    """A paused server may not answer /health: requests wait for it, and it is never taken out."""
    fast = {"health-check-interval-secs": 1, "health-failure-threshold": 1, "health-check-timeout-secs": 1}

    async def check() -> None:
        async with rig(tmp_path, workers=1, args=fast) as it:
            await it.workers[0].tell("sicken")
            held = asyncio.create_task(it.ask("e0/0", hold=True))
            await until(lambda: _arrived(it.workers[0]))
            for _ in range(20):  # three times the interval; the answer below is what is checked
                assert all(worker.healthy for worker in await it.router.workers())
                await asyncio.sleep(0.15)
            assert await it.name("e1/0") == "w0"
            await it.workers[0].tell("release")
            assert (await held).status_code == 200

    run(check())


async def _arrived(worker: Worker) -> bool:
    return len(await worker.seen()) > 0


def test_removal_lets_running_requests_end(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as it:
            home = await it.name("e0/0")
            worker = next(each for each in it.workers if each.name == home)
            held = asyncio.create_task(it.ask("e0/0", hold=True))

            async def two() -> bool:
                return len(await worker.seen()) == 2

            await until(two)
            await it.router.remove(worker.url)
            await it.router.remove(worker.url)  # unknown by now: harmless
            assert [each.url for each in await it.router.workers()] == [w.url for w in it.workers if w is not worker]
            assert await it.name("e0/0") != home
            await worker.tell("release")
            assert (await held).json()["meta_info"]["name"] == home
            await it.router.add(worker.url)
            await it.router.add(worker.url)  # twice: harmless
            assert len(await it.router.workers()) == 2

    run(check())


def test_a_killed_router_is_noticed_and_another_takes_over(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as it:
            ended = asyncio.create_task(it.router.ended())
            os.kill(it.router.process.pid, signal.SIGKILL)
            assert "exit code -9" in await ended
            # what the fleet does: another router, on the same port where the recipe names one, and everybody added
            port = httpx.URL(it.router.url).port
            again = Router(RouterConfig(port=port), python=cpu.interpreter(), log_path=tmp_path / "router-1.log")
            try:
                await again.start()
                assert again.url == it.router.url
                for worker in it.workers:
                    await again.add(worker.url)
                assert await it.name("e0/0") in ("w0", "w1")
            finally:
                await again.close()

    run(check())


def test_prefill_and_decode_start_empty_and_take_workers(tmp_path: Path) -> None:
    async def check() -> None:
        async with contextlib.AsyncExitStack() as stack:
            config = RouterConfig(prefill_policy="round_robin", decode_policy="manual")
            router = Router(config, python=cpu.interpreter(), log_path=tmp_path / "router.log", pd=True)
            stack.push_async_callback(router.close)
            await router.start()
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=60))
            workers: dict[str, Worker] = {}
            for role in ("prefill", "decode"):
                workers[role] = await start_worker(role, tmp_path, role)
                stack.push_async_callback(workers[role].process.stop, 1.0)
                port = 8998 if role == "prefill" else None
                await router.add(workers[role].url, role=role, bootstrap_port=port)
            assert {each.role for each in await router.workers()} == {"prefill", "decode"}
            reply = await client.post(f"{router.url}/generate", json={**PROMPT, "extra_key": "v1"})
            assert reply.json()["meta_info"]["name"] == "decode"
            [prefill], [decode] = [await workers[role].seen() for role in ("prefill", "decode")]
            assert prefill["body"]["bootstrap_port"] == decode["body"]["bootstrap_port"] == 8998
            assert prefill["body"]["bootstrap_room"] == decode["body"]["bootstrap_room"]
            assert prefill["body"]["extra_key"] == "v1"

    run(check())


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────


def refused(folder: Path, config: RouterConfig, python: Path | None = None) -> EngineError:
    async def check() -> EngineError:
        router = Router(config, python=python or cpu.interpreter(), log_path=folder / "router.log")
        try:
            with pytest.raises(EngineError) as caught:
                await router.start()
            return caught.value
        finally:
            await router.close()

    return asyncio.run(asyncio.wait_for(check(), 120))


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is taken" in str(refused(tmp_path, RouterConfig(port=port)))


def test_an_unknown_argument_is_the_routers_own_error(tmp_path: Path) -> None:
    error = refused(tmp_path, RouterConfig(args={"frobnicate": 3}))
    assert "unrecognized arguments: --frobnicate 3" in str(error)
    assert "exit code 2" in str(error)


def test_no_environment_names_the_command(tmp_path: Path) -> None:
    error = refused(tmp_path, RouterConfig(), python=tmp_path / "nowhere")
    assert "sluice engines install sglang" in error.hint


def bare_python(folder: Path, site: Path | None = None) -> Path:
    """An interpreter that sees no installed package but those of `site`."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site or ""} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


def test_an_interpreter_without_smg_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, RouterConfig(), python=bare_python(tmp_path))
    assert isinstance(error, CapabilityError)
    assert "has no router (smg)" in str(error)


def test_the_old_router_is_refused_with_the_reason(tmp_path: Path) -> None:
    """An interpreter whose only router is sglang-router, by the metadata that pip would leave."""
    site = tmp_path / "site"
    (site / "sglang_router-0.3.2.dist-info").mkdir(parents=True)
    text = "Metadata-Version: 2.1\nName: sglang-router\nVersion: 0.3.2\n"
    (site / "sglang_router-0.3.2.dist-info" / "METADATA").write_text(text)
    error = refused(tmp_path, RouterConfig(), python=bare_python(tmp_path, site))
    assert isinstance(error, CapabilityError)
    assert "silently drops return_routed_experts" in str(error)


def test_no_key_is_on_a_command_line(tmp_path: Path) -> None:
    async def check() -> None:
        key = "k-0123456789"
        router = Router(RouterConfig(), python=cpu.interpreter(), log_path=tmp_path / "router.log", api_key=key)
        try:
            await router.start()
            worker = await start_worker("w0", tmp_path)
            try:
                await router.add(worker.url)
                words = Path(f"/proc/{router.process.pid}/cmdline").read_text()  # noqa: ASYNC240 - no disk
                assert "smg" in words
                assert key not in words
                assert key not in (tmp_path / "router.log").read_text()
            finally:
                await worker.process.stop(1.0)
        finally:
            await router.close()

    run(check())
