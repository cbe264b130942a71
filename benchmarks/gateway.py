"""What the gateway costs: latency it adds, requests a second, memory of open sessions.

    python -m benchmarks.gateway [--seconds 8] [--sessions 1000] [--turns 6] [--out FILE]

Against a trivial engine, so that nothing but the layers is measured, in one run on one machine:

* `worker`: a fake SGLang worker, asked directly;
* `router`: the same worker behind the real router;
* `gateway, engine in process`: chat completions through the gateway, the engine a scripted one in its process;
* `gateway, router, worker`: chat completions through the gateway, Sluice's fleet and the router to the fake worker.

The sender is a process of its own (aiohttp). Latency is taken with one request at a time, the rate with 32. Every chat
request is the first turn of a session; `turn_ms` is a conversation of many turns, whose history is matched each time.
Memory: sessions stay open over HTTP, and each has a turn after the other; resident and traced bytes per token held.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import tempfile
import tracemalloc
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from benchmarks.rig import command_line, machine, parser, report, say, spread
from tests import tool_model

from sluice.config.gateway import ChatConfig, GatewayConfig
from sluice.config.rollout import RolloutConfig
from sluice.config.router import RouterConfig
from sluice.models.build import load_tokenizer, make_scratch
from sluice.orchestrate.serve import FolderSource
from sluice.rollout.chat.base import ChatMessage
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import Capabilities, Engine, Finish, GenerateRequest, Generation, PauseMode
from sluice.rollout.engines.sglang.make import make_fleet
from sluice.rollout.gateway.desk import Lease
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.process import ManagedProcess, start_on_port
from sluice.rollout.router import Router
from sluice.rollout.runners.base import turn_noise
from sluice.rollout.session import Limits
from sluice.types import Prompt, SamplingParams, Version, VersionSpan
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore, activate
from sluice_engine import cpu

CONTEXT = 16_384
PARALLEL = 32
QUESTION = "add 3 4"
ANSWER = "= 7"


class Scripted:
    """An engine that answers the same ids at once."""

    name = "scripted"
    version = Version(0)

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = np.asarray(ids, np.int32)

    async def start(self) -> Capabilities:
        return Capabilities(self.name, "1", CONTEXT)

    async def generate(self, request: GenerateRequest) -> Generation:
        if request.on_tokens is not None:
            request.on_tokens(self._ids.tolist())
        spans = (VersionSpan(0, len(self._ids), self.version),)
        return Generation(self._ids, np.full(len(self._ids), -0.5, np.float32), spans, Finish.STOP)

    async def abort(self, rids: Sequence[str] | None = None) -> None: ...

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None: ...

    async def resume(self) -> None: ...

    async def close(self) -> None: ...

    async def release(self, routing_key: str) -> None: ...


class Bench:
    """A gateway before an engine, sessions in it, and a sender."""

    def __init__(self, engine: Engine, chat: ChatRenderer) -> None:
        limits = Limits(context_length=CONTEXT)
        self.gateway = Gateway(GatewayConfig(max_sessions=100_000), engine=engine, chat=chat, limits=limits)
        self._sampling = SamplingParams(max_new_tokens=64, stop_token_ids=chat.eos)
        self._opened = 0

    def open(self) -> tuple[str, str]:
        """A session's id and key."""
        number = self._opened
        self._opened += 1
        prompt = Prompt(f"p{number}", "add", ())
        session, key = self.gateway.open(
            Lease(f"e{number}", f"g{number}", prompt, self._sampling, turn_noise(0, number))
        )
        return session.id, key

    def lanes(self, count: int, bodies: Sequence[str]) -> list[dict[str, Any]]:
        return [{"headers": json_headers(self.open()[1]), "bodies": list(bodies)} for _ in range(count)]

    async def measure(self, seconds: float) -> dict[str, Any]:
        url = f"{self.gateway.url}/v1/chat/completions"
        first = [conversation(1)[0]]
        return {
            **await both(url, lambda count: self.lanes(count, first), seconds),
            "turn_ms": await turns(url, self.lanes(1, conversation(24)), seconds),
        }


def json_headers(key: str = "") -> dict[str, str]:
    return {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}


def conversation(count: int) -> list[str]:
    """Request bodies of a conversation of `count` turns; the answers are known beforehand."""
    messages: list[dict[str, str]] = []
    bodies: list[str] = []
    for _ in range(count):
        messages.append({"role": "user", "content": QUESTION})
        bodies.append(json.dumps({"model": "actor", "messages": messages}))
        messages.append({"role": "assistant", "content": ANSWER})
    return bodies


async def both(url: str, lanes: Any, seconds: float) -> dict[str, Any]:
    """One request at a time, then 32."""
    await load(url, lanes(200), 1, seconds)
    alone = await load(url, lanes(int(400 * seconds)), 1, seconds)
    many = await load(url, lanes(int(3_000 * seconds)), PARALLEL, seconds)
    return {
        "latency_ms": spread(alone["latencies"]),
        "requests_per_second": round(many["requests"] / many["seconds"]),
        "latency_ms_at_32": spread(many["latencies"]),
    }


async def turns(url: str, lanes: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Latency of the first, middle and last turn of one conversation."""
    found = (await load(url, lanes, 1, seconds * 4))["latencies"]
    return {f"{at + 1}": round(found[at], 2) for at in (0, len(found) // 2, len(found) - 1)}


async def load(url: str, lanes: list[dict[str, Any]], parallel: int, seconds: float) -> dict[str, Any]:
    """Run the sender. SystemExit unless every answer was 200."""
    plan = json.dumps({"url": url, "lanes": lanes, "parallel": parallel, "seconds": seconds})
    sender = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.http_load", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(seconds + 120):
        out, _ = await sender.communicate(plan.encode())
    found = json.loads(out)
    if set(found["statuses"]) != {"200"}:
        raise SystemExit(f"{url} answered {found['statuses']}")
    return found


async def start_worker(ids: Sequence[int], folder: Path) -> tuple[ManagedProcess, str]:
    """A fake worker in a process of its own."""

    async def begin(port: int) -> tuple[ManagedProcess, str]:
        url = f"http://127.0.0.1:{port}"

        async def ready() -> bool:
            async with httpx.AsyncClient() as client:
                try:
                    return (await client.get(f"{url}/health")).is_success
                except httpx.TransportError:
                    return False

        words = [sys.executable, "-m", "benchmarks.trivial_worker", str(port), *map(str, ids)]
        log_path = folder / "worker.log"
        process = await ManagedProcess.start("worker", words, env={}, log_path=log_path, ready=ready, seconds=60)
        return process, url

    return await start_on_port(begin)


async def layers(folder: Path, arguments: Any) -> dict[str, Any]:
    """All measurements of latency and rate."""
    make_scratch(tool_model.SCRATCH, folder / "model", seed=0)
    chat = ChatRenderer(load_tokenizer(folder / "model"), ChatConfig(format="qwen"))
    ids = [*chat.encode(ANSWER).tolist(), chat.eos[0]]
    found: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        worker, worker_url = await start_worker(ids, folder)
        stack.push_async_callback(worker.stop)
        sampling = {"max_new_tokens": 64, "stop_token_ids": list(chat.eos)}
        prompt = list(range(10, 30))
        raw = json.dumps({"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})

        def plain(count: int) -> list[dict[str, Any]]:
            return [{"headers": json_headers() | {"x-smg-routing-key": f"k{n}"}, "bodies": [raw]} for n in range(count)]

        say("worker")
        found["worker"] = await both(f"{worker_url}/generate", plain, arguments.seconds)
        say("router")
        router = Router(RouterConfig(), python=arguments.router_python, log_path=folder / "router.log")
        await router.start()
        stack.push_async_callback(router.close)
        await router.add(worker_url)
        found["router"] = await both(f"{router.url}/generate", plain, arguments.seconds)
        say("gateway, engine in process")
        scripted = Bench(Scripted(ids), chat)
        await scripted.gateway.start()
        found["gateway, engine in process"] = await scripted.measure(arguments.seconds)
        await scripted.gateway.stop()
        say("gateway, router, worker")
        rollout = {"engine": "sglang", "sglang": {"urls": [worker_url], "sync": "disk"}, "router": {"use": "always"}}
        rollout["router"] |= {"python": str(arguments.router_python)}
        config = RolloutConfig.model_validate(rollout)
        fleet = make_fleet(config, model=folder / "model", folder=folder, device="cpu", progress=say)
        stack.push_async_callback(fleet.close)
        await fleet.start()
        store = WeightStore(folder / "weights", folder / "model", Lineage())
        await activate(store.publish(FolderSource(folder / "model"), 0), [fleet])
        through = Bench(fleet, chat)
        await through.gateway.start()
        found["gateway, router, worker"] = await through.measure(arguments.seconds)
        await through.gateway.stop()
    router_ms, whole_ms = (found[name]["latency_ms"]["p50"] for name in ("router", "gateway, router, worker"))
    found["added_ms_over_the_router_p50"] = round(whole_ms - router_ms, 3)
    return found


async def memory(folder: Path, arguments: Any) -> list[dict[str, Any]]:
    """Open sessions over HTTP; after every round of turns, what is held."""
    make_scratch(tool_model.SCRATCH, folder / "model", seed=0)
    chat = ChatRenderer(load_tokenizer(folder / "model"), ChatConfig(format="qwen"))
    ids = [*chat.encode(ANSWER).tolist(), chat.eos[0]]
    bench = Bench(Scripted(ids), chat)
    await bench.gateway.start()
    bodies = conversation(arguments.turns)
    url = f"{bench.gateway.url}/v1/chat/completions"
    opened = [bench.open() for _ in range(8)]  # warms up what is made once
    await load(url, [{"headers": json_headers(key), "bodies": bodies} for _, key in opened], 8, 60)
    keys = [bench.open()[1] for _ in range(arguments.sessions)]
    length = len(chat.begin([*_messages(1)])) + len(ids)
    step = len(chat.begin([*_messages(2)])) + len(ids) - length
    gc.collect()
    tracemalloc.start()
    process, rows = psutil.Process(), list[dict[str, Any]]()
    resident, traced = process.memory_info().rss, tracemalloc.get_traced_memory()[0]
    for at, body in enumerate(bodies):
        await load(url, [{"headers": json_headers(key), "bodies": [body]} for key in keys], PARALLEL, 600)
        gc.collect()
        tokens = len(keys) * (length + at * step)
        now = tracemalloc.get_traced_memory()[0] - traced
        rows.append(
            {
                "turns": at + 1,
                "sessions": len(keys),
                "tokens": tokens,
                "traced_bytes_per_token": round(now / tokens, 1),
                "resident_mib_more": round((process.memory_info().rss - resident) / 2**20, 1),
            }
        )
        say(str(rows[-1]))
    tracemalloc.stop()
    await bench.gateway.stop()
    return rows


def _messages(questions: int) -> list[Any]:
    pair = [ChatMessage("user", QUESTION), ChatMessage("assistant", ANSWER)]
    return [*pair * (questions - 1), pair[0]]


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    arguments_of.add_argument("--sessions", type=int, default=1_000)
    arguments_of.add_argument("--turns", type=int, default=6)
    arguments_of.add_argument("--router-python", type=Path, help="holds smg. Default: the CPU engines' environment")
    arguments_of.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = arguments_of.parse_args()
    arguments.router_python = arguments.router_python or cpu.interpreter()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        found: dict[str, Any] = {"layers": asyncio.run(layers(Path(one), arguments))}
        found["open_sessions"] = asyncio.run(memory(Path(two), arguments))
    report({"command": command_line("gateway"), **machine(), **found}, arguments.out)


if __name__ == "__main__":
    main()
