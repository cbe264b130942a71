"""The SGLang client against a real server on the CPU.

Needs the engine's own environment: sluice engines install sglang --cpu. One server serves all tests of this file;
each test activates the weights it needs.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tests.integration.sglang_server import Server, running_sglang, write_tiny_model
from tests.integration.sglang_weights import PROMPT, TOLERANCE, Weights, check, logprobs
from torch import Tensor

from sluice.config.rollout import SGLangConfig
from sluice.errors import CapabilityError, EngineError, Unroutable, WeightsError
from sluice.rollout.engines.base import Finish, GenerateRequest, Generation, PauseMode
from sluice.rollout.engines.sglang import SGLangEngine
from sluice.types import SamplingParams, Version
from sluice.weights.store import MemoryWeights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = SamplingParams(max_new_tokens=400)
SHORT = SamplingParams(max_new_tokens=24)


def request(rid: str, sampling: SamplingParams, prompt: list[int] = PROMPT) -> GenerateRequest:
    return GenerateRequest(rid, np.array(prompt, np.int32), sampling)


async def progress(engine: SGLangEngine, beside: asyncio.Task[Generation], rid: str) -> None:
    """Return once `beside` has drawn about 24 tokens: a short request in the same batch has finished."""
    await asyncio.sleep(0)
    await engine.generate(request(rid, SHORT))
    assert not beside.done()


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_sglang(folder, log_path=tmp_path_factory.mktemp("sglang") / "server.log") as server:
        yield server


@pytest.fixture
def weights(folder: Path, tmp_path: Path) -> Weights:
    return Weights(folder, tmp_path)


@asynccontextmanager
async def connected(server: Server, **config: Any):
    engine = SGLangEngine(server.url, SGLangConfig(**{"control_seconds": 60, "request_seconds": 120, **config}))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


# ── handshake and generation ────────────────────────────────────────────────────────────────────────────────


def test_the_handshake_says_what_the_server_can_do(server: Server) -> None:
    async def main() -> None:
        async with connected(server) as engine:
            found = await engine.start()
            assert found.engine_version == "sglang 0.5.21"
            assert found.context_length == 512
            assert found.logprobs
            assert found.version_spans
            assert found.bracketed_updates
            assert not found.keyed_noise
            assert found.pause_modes == frozenset(PauseMode)
            assert engine.version is None
            with pytest.raises(Unroutable, match="no weights have been applied"):
                await engine.generate(request("a", SHORT))

    asyncio.run(main())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_trainers_model(server: Server, weights: Weights, temperature: float) -> None:
    async def main() -> None:
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            sampling = SamplingParams(max_new_tokens=200, temperature=temperature)
            many = await asyncio.gather(*(engine.generate(request(f"r{n}", sampling)) for n in range(16)))
            assert len({got.ids.tobytes() for got in many}) == 16
            for got in many:
                assert got.finish is Finish.LENGTH
                assert len(got.ids) == 200
                assert got.sampled_logprobs is None
                check(weights, got, Version(0), temperature)

    asyncio.run(main())


def test_stops_keep_the_tokens_that_spell_them(server: Server, weights: Weights) -> None:
    async def main() -> None:
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            by_id = await engine.generate(
                request("id", SamplingParams(max_new_tokens=400, stop_token_ids=(18, 20, 47)))
            )
            assert by_id.finish is Finish.STOP
            assert by_id.ids[-1] in (18, 20, 47)
            assert not set(by_id.ids[:-1].tolist()) & {18, 20, 47}
            by_text = await engine.generate(request("text", SamplingParams(max_new_tokens=400, stop=("7", "8"))))
            assert by_text.finish is Finish.STOP
            assert by_text.ids[-1] in (9, 10)
            assert len(by_text.ids) == len(by_text.logprobs)

    asyncio.run(main())


def test_a_cut_distribution_is_reported_or_refused(server: Server, weights: Weights) -> None:
    async def main() -> None:
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            got = await engine.generate(request("k", SamplingParams(max_new_tokens=50, top_k=5)))
            ids = got.ids.tolist()
            check(weights, got, Version(0))
            top = weights.logits(PROMPT + ids)[len(PROMPT) - 1 : -1].topk(5)
            kept = (
                logprobs(weights, PROMPT, ids)
                - (top.values.logsumexp(-1) - weights.logits(PROMPT + ids)[len(PROMPT) - 1 : -1].logsumexp(-1)).numpy()
            )
            assert got.sampled_logprobs is not None
            np.testing.assert_allclose(got.sampled_logprobs, kept, rtol=0, atol=TOLERANCE)
            with pytest.raises(CapabilityError, match="also set top_k"):
                await engine.generate(request("p", SamplingParams(top_p=0.9)))

    asyncio.run(main())


def test_requests_that_cannot_be_served_are_refused_before_they_reach_the_server(
    server: Server, weights: Weights
) -> None:
    async def main() -> None:
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            with pytest.raises(EngineError, match="600 context tokens"):
                await engine.generate(request("long", SHORT, [3] * 600))
            with pytest.raises(EngineError, match="the vocabulary has 64"):
                await engine.generate(request("id", SHORT, [3, 64]))
            nearly_full = await engine.generate(request("capped", SHORT, [3] * 500))
            assert nearly_full.finish is Finish.LENGTH
            assert 1 <= len(nearly_full.ids) <= 12

    asyncio.run(main())


# ── aborts and deadlines ────────────────────────────────────────────────────────────────────────────────────


def test_abort_ends_one_request_and_not_its_namesakes(server: Server, weights: Weights) -> None:
    async def main() -> None:
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            one = asyncio.create_task(engine.generate(request("g1.1", LONG)))
            other = asyncio.create_task(engine.generate(request("g1.10", LONG)))
            await progress(engine, one, "beside")
            await engine.abort(["g1.1", "unknown"])
            got = await one
            assert got.finish is Finish.ABORT
            assert 0 < len(got.ids) < 400
            check(weights, got, Version(0))
            rest = await other
            assert rest.finish is Finish.LENGTH
            assert len(rest.ids) == 400

    asyncio.run(main())


def test_a_request_aborted_while_the_engine_is_paused_never_runs(server: Server, weights: Weights) -> None:
    async def main() -> None:
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            await engine.pause()
            waiting = asyncio.create_task(engine.generate(request("w", LONG)))
            await asyncio.sleep(0)
            await engine.abort()
            got = await waiting
            assert got.finish is Finish.ABORT
            assert len(got.ids) == 0
            await engine.resume()

    asyncio.run(main())


def test_cancelling_or_missing_the_deadline_ends_the_request_at_the_server(server: Server, weights: Weights) -> None:
    async def idle() -> bool:
        async with httpx.AsyncClient(base_url=server.url) as client:
            # the server only forgets its cached prefixes when nothing is running or queued
            return (await client.post("/flush_cache", timeout=30)).is_success

    async def main() -> None:
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            running = asyncio.create_task(engine.generate(request("r", LONG)))
            await progress(engine, running, "beside")
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await eventually(idle)
        async with connected(server, request_seconds=0.2) as engine:
            await engine.apply(weights.publish())
            with pytest.raises(EngineError, match=r"did not finish request 'd' within 0\.2 s"):
                await engine.generate(request("d", LONG))
            await eventually(idle)

    asyncio.run(main())


def test_nobody_at_the_url_is_an_error_that_names_it() -> None:
    async def main() -> None:
        engine = SGLangEngine("http://127.0.0.1:9", SGLangConfig())
        with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
            await engine.start()
        await engine.close()

    asyncio.run(main())


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("config", [{"sync": "disk"}, {"sync": "tensor"}, {"sync": "tensor", "bucket_bytes": 65_536}])
def test_every_version_is_served_whole(server: Server, weights: Weights, config: dict[str, Any]) -> None:
    async def main() -> None:
        async with connected(server, **config) as engine:
            for step in range(3):  # the same prompt: a stale cached prefix would be found
                await engine.apply(weights.publish())
                assert engine.version == Version(step)
                check(weights, await engine.generate(request("r", SHORT)), Version(step))

    before = set(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))
    asyncio.run(main())
    assert set(Path("/dev/shm").glob(f"torch_{os.getpid()}_*")) <= before


def test_both_ways_put_the_same_bits_into_the_server(server: Server, weights: Weights) -> None:
    async def checksum() -> str:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            reply = await client.post("/weights_checker", json={"action": "checksum"})
            return reply.raise_for_status().json()["per_engine_checksum"]

    async def main() -> None:
        published = weights.publish()
        seen: dict[str, str] = {}
        for sync in ("disk", "tensor"):
            async with connected(server, sync=sync, bucket_bytes=65_536) as engine:
                await engine.apply(published)
                seen[sync] = await checksum()
        assert seen["disk"] == seen["tensor"]
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            assert await checksum() not in seen.values()

    asyncio.run(main())


@pytest.mark.parametrize("sync", ["disk", "tensor"])
def test_a_turn_cut_by_an_update_goes_on_under_the_new_weights(server: Server, weights: Weights, sync: str) -> None:
    async def main() -> None:
        async with connected(server, sync=sync) as engine:
            await engine.apply(weights.publish())
            old = {name: tensor.clone() for name, tensor in weights.model.state_dict().items()}
            long = asyncio.create_task(engine.generate(request("long", LONG)))
            await progress(engine, long, "beside")
            await engine.apply(weights.publish())  # pauses and resumes by itself
            got = await long
            assert got.finish is Finish.LENGTH
            assert len(got.ids) == 400
            assert [span.version for span in got.spans] == [Version(0), Version(1)]
            cut = got.spans[0].end
            new = logprobs(weights, PROMPT, got.ids.tolist())
            weights.model.load_state_dict(old)
            before = logprobs(weights, PROMPT, got.ids.tolist())
            np.testing.assert_allclose(got.logprobs[:cut], before[:cut], rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(got.logprobs[cut:], new[cut:], rtol=0, atol=TOLERANCE)
            assert np.abs(new[cut:] - before[cut:]).max() > 100 * TOLERANCE

    asyncio.run(main())


@pytest.mark.parametrize("sync", ["disk", "tensor"])
def test_keep_kv_marks_the_swap_and_hides_old_keys_from_new_requests(
    server: Server, weights: Weights, sync: str
) -> None:
    async def main() -> None:
        async with connected(server, sync=sync) as engine:
            await engine.apply(weights.publish())
            long = asyncio.create_task(engine.generate(request("long", LONG)))
            await progress(engine, long, "beside")
            await engine.pause(PauseMode.KEEP_KV)
            await engine.apply(weights.publish())
            assert not long.done()
            fresh = asyncio.create_task(engine.generate(request("fresh", SHORT)))
            await engine.resume()
            check(weights, await fresh, Version(1))
            got = await long
            assert got.finish is Finish.LENGTH
            assert [span.version for span in got.spans] == [Version(0), Version(1)]

    asyncio.run(main())


def test_an_abort_pause_returns_what_there_is(server: Server, weights: Weights) -> None:
    async def main() -> None:
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            long = asyncio.create_task(engine.generate(request("long", LONG)))
            await progress(engine, long, "beside")
            await engine.pause(PauseMode.KEEP_KV)
            await engine.pause(PauseMode.ABORT)
            got = await long
            assert got.finish is Finish.ABORT
            check(weights, got, Version(0))
            await engine.flush()
            await engine.resume()
            assert (await engine.generate(request("next", SHORT))).finish is Finish.LENGTH

    asyncio.run(main())


def test_a_failed_update_makes_the_engine_unroutable_until_a_whole_one(server: Server, weights: Weights) -> None:
    class Bad(MemoryWeights):
        """A version that tears: its second half does not fit the model."""

        def tensors(self) -> Iterator[tuple[str, Tensor]]:
            for number, (name, tensor) in enumerate(super().tensors()):
                yield name, tensor if number < 10 else torch.zeros(3, 5, 7)

    async def main() -> None:
        async with connected(server, bucket_bytes=65_536) as engine:
            good = weights.publish()
            await engine.apply(good)
            long = asyncio.create_task(engine.generate(request("long", LONG)))
            await progress(engine, long, "beside")
            second = weights.publish()
            bad = Bad(second.manifest, dict(second.tensors()), Path("unused"), Path("unused"))
            with pytest.raises(WeightsError, match="its manifest says"):
                await engine.apply(bad)
            assert engine.version is None
            with pytest.raises(Unroutable):
                await long
            with pytest.raises(Unroutable):
                await engine.generate(request("after", SHORT))
            await engine.resume()  # does not help
            with pytest.raises(Unroutable):
                await engine.generate(request("after", SHORT))
            await engine.apply(second)
            check(weights, await engine.generate(request("healed", SHORT)), Version(1))

    asyncio.run(main())


def test_a_folder_the_server_cannot_read_is_a_weights_error(server: Server, weights: Weights, tmp_path: Path) -> None:
    class Elsewhere(MemoryWeights):
        def folder(self) -> Path:
            return tmp_path / "not there"

    async def main() -> None:
        async with connected(server, sync="disk") as engine:
            published = weights.publish()
            with pytest.raises(WeightsError, match="a folder that the server can read"):
                await engine.apply(Elsewhere(published.manifest, {}, Path("unused"), Path("unused")))
            assert engine.version is None
            await engine.apply(published)
            check(weights, await engine.generate(request("healed", SHORT)), Version(0))

    asyncio.run(main())


def test_a_client_takes_over_from_one_that_died_in_the_middle_of_an_update(server: Server, weights: Weights) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as died:
            await died.post("/pause_generation", json={"mode": "retract"})
            (await died.post("/begin_weight_update", json={})).raise_for_status()
        for sync in ("tensor", "disk"):
            async with connected(server, sync=sync) as engine:
                await engine.apply(weights.publish())
                got = await engine.generate(request("r", SHORT))
                check(weights, got, Version(weights.step))

    asyncio.run(main())


def test_weights_that_somebody_else_put_there_are_not_served(server: Server, weights: Weights) -> None:
    async def main() -> None:
        async with connected(server) as engine:
            await engine.apply(weights.publish())
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as other:
                body = {"new_version": "theirs", "abort_all_requests": False}
                (await other.post("/update_weight_version", json=body)).raise_for_status()
            with pytest.raises(Unroutable, match="weights called 'theirs'"):
                await engine.generate(request("r", SHORT))
            assert engine.version is None

    asyncio.run(main())


def test_the_trainers_side_needs_torch_only_and_leaves_no_process_behind(server: Server, weights: Weights) -> None:
    code = f"""
import sys, torch, httpx
from sluice.rollout.engines.sglang.tensors import serialise
texts = serialise([("model.norm.weight", torch.ones(128))])
client = httpx.Client(base_url={server.url!r}, timeout=30)
for route, body in (("begin_weight_update", {{}}), ("update_weights_from_tensor", {{
        "serialized_named_tensors": texts, "weight_version": "x"}}), ("end_weight_update", {{}})):
    client.post("/" + route, json=body).raise_for_status()
assert not [name for name in sys.modules if name.startswith("sglang")]
"""
    # the pipes would never end if torch's helper process outlived the script
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
