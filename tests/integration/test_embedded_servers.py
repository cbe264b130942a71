"""Servers of the embedded engine: real processes, over HTTP, told by the same client as SGLang's."""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from tests.integration.sglang_server import write_tiny_model
from tests.integration.sglang_weights import PROMPT, Weights
from tests.tiny import tiny

from sluice.config.rollout import EmbeddedConfig, RolloutConfig
from sluice.errors import ConfigError, WeightsError
from sluice.log import ACCOUNTED, Kind, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api
from sluice.rollout.engines.base import Finish, GenerateRequest, Generation, PauseMode
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.rollout.engines.embedded.launch import make_fleet
from sluice.rollout.engines.embedded.received import read_bucket
from sluice.rollout.engines.sglang.fleet import SGLangFleet
from sluice.rollout.engines.sglang.member import State
from sluice.train.backends.torch import TorchTrainer
from sluice.train.base import Loss, StepStats
from sluice.types import SamplingParams, TrainBatch

SIZES: dict[str, Any] = {"kv_tokens": 4096, "context_length": 256}


def rollout(servers: int, **sglang: Any) -> RolloutConfig:
    return RolloutConfig.model_validate({"embedded": {**SIZES, "servers": servers}, "sglang": sglang})


def ask(number: int, *, tokens: int = 24, **more: Any) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=tokens, **{"temperature": 0.9, **more.pop("sampling", {})})
    ids = np.array([*PROMPT, number % 40 + 3], np.int32)
    return GenerateRequest(f"turn-{number}", ids, sampling, noise_key=977 * number + 2**63, **more)


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - bounded by `run`
        await asyncio.sleep(0.01)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(240):
            await body()

    asyncio.run(bounded())


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    folder = tmp_path / "model"
    write_tiny_model(folder)
    return Weights(folder, tmp_path / "weights")


def fleet(tmp_path: Path, servers: int, told: list[str] | None = None, **sglang: Any) -> SGLangFleet:
    progress = told.append if told is not None else None
    return make_fleet(
        rollout(servers, **sglang), model=tmp_path / "model", folder=tmp_path, device="cpu", progress=progress
    )


def same(a: Generation, b: Generation) -> None:
    """Bit for bit: tokens, log-probs, versions."""
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert (a.spans, a.finish) == (b.spans, b.finish)


def test_a_server_answers_as_the_engine_in_process_does(tmp_path: Path, weights: Weights) -> None:
    """Draws follow the noise key, through HTTP and streamed; other sampling is reported as well."""

    async def body() -> None:
        here = EmbeddedEngine.from_model(weights.model, None, EmbeddedConfig(**SIZES))
        engine = fleet(tmp_path, 1, bucket_bytes=64 * 1024)  # several buckets an update
        requests = [ask(number) for number in range(16)]
        requests += [ask(16, sampling={"temperature": 0.0}), ask(17, sampling={"top_p": 0.8, "top_k": 12})]
        requests += [ask(18, sampling={"min_p": 0.1}), ask(19, sampling={"stop_token_ids": (5, 6, 7, 8, 9, 10)})]
        try:
            capabilities = await engine.start()
            assert (capabilities.keyed_noise, capabilities.version_spans) == (True, True)
            for _ in range(2):
                published = weights.publish()
                await asyncio.gather(engine.apply(published), here.apply(published))
                told: list[list[int]] = [[] for _ in requests]
                streamed = [
                    replace(each, rid=f"s{each.rid}", on_tokens=told[n].extend) for n, each in enumerate(requests)
                ]
                there, live, ours = await asyncio.gather(
                    asyncio.gather(*(engine.generate(each) for each in requests)),
                    asyncio.gather(*(engine.generate(each) for each in streamed)),
                    asyncio.gather(*(here.generate(each) for each in requests)),
                )
                for whole, parts, expected in zip(there, live, ours, strict=True):
                    same(whole, expected)
                    same(parts, expected)
                assert told == [each.ids.tolist() for each in ours]
                assert len({tuple(each.ids.tolist()) for each in ours}) > 15  # they are not all alike
                for at in (17, 18):
                    assert ours[at].sampled_logprobs is not None
                    np.testing.assert_array_equal(there[at].sampled_logprobs, ours[at].sampled_logprobs)
                    np.testing.assert_array_equal(live[at].sampled_logprobs, ours[at].sampled_logprobs)
                assert there[19].finish is Finish.STOP
        finally:
            await asyncio.gather(engine.close(), here.close())

    run(body)
    assert not [each for each in psutil.Process().children(recursive=True) if "embedded.server" in " ".join(cmd(each))]


def cmd(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def test_what_a_server_does_not_take(tmp_path: Path, weights: Weights) -> None:
    """A pickle that would run code, weights of another model, a mode nobody knows: said so, and it serves on."""

    async def body() -> None:
        engine = fleet(tmp_path, 1, sync="disk")
        try:
            await engine.start()
            await engine.apply(weights.publish())
            first = await engine.generate(ask(1))
            (member,) = engine.members()
            async with httpx.AsyncClient(base_url=member.url, timeout=30) as client:
                evil = base64.b64encode(pickle.dumps(Evil(tmp_path / "ran"))).decode()
                reply = await client.post("/update_weights_from_tensor", json={"serialized_named_tensors": [evil]})
                assert (reply.status_code, (tmp_path / "ran").exists()) == (400, False)
                assert "posix.system" in reply.json()["message"]
                reply = await client.post("/update_weights_from_disk", json={"model_path": str(tmp_path / "none")})
                assert reply.status_code == 400
                assert "no safetensors" in reply.json()["message"]
                reply = await client.post("/pause_generation", json={"mode": "later"})
                assert reply.status_code == 422
                reply = await client.post("/generate", json={"input_ids": [1], "sampling_params": {"top_k": "many"}})
                assert reply.status_code == 400
            same(await engine.generate(ask(1)), first)
        finally:
            await engine.close()

    run(body)


class Evil:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("text", ["", "no base64!", base64.b64encode(b"\x80\x04.").decode(), base64.b64encode(
    pickle.dumps([1, 2])).decode()])  # fmt: skip
def test_a_bucket_that_cannot_be_read(text: str) -> None:
    with pytest.raises(WeightsError):
        read_bucket(text)


def test_several_servers_need_a_router(tmp_path: Path) -> None:
    config = RolloutConfig.model_validate({"embedded": {"servers": 2}, "router": {"use": "never"}})
    with pytest.raises(ConfigError, match="2 engines need a router"):
        make_fleet(config, model=tmp_path, folder=tmp_path, device="cpu")


@pytest.mark.slow
def test_updates_pauses_and_a_death_between_two_servers(tmp_path: Path, weights: Weights) -> None:
    """Turns that a swap or a kill cuts go on elsewhere, token by token as if nothing had happened under one version."""

    async def body() -> None:
        told: list[str] = []
        here = EmbeddedEngine.from_model(weights.model, None, EmbeddedConfig(**SIZES))
        engine = fleet(tmp_path, 2, told)
        try:
            await engine.start()
            first = weights.publish()
            await asyncio.gather(engine.apply(first), here.apply(first))
            turns = [ask(number, tokens=200, routing_key=f"e{number}") for number in range(24)]
            expected = await asyncio.gather(*(here.generate(each) for each in turns))

            running = asyncio.gather(*(engine.generate(each) for each in turns))
            await until(lambda: any(member.in_flight for member in engine.members()))
            await engine.pause(PauseMode.RECOMPUTE)
            await engine.resume()
            victim = max(engine.members(), key=lambda member: member.in_flight)
            os.kill(victim.process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            for a, b in zip(await running, expected, strict=True):
                np.testing.assert_array_equal(a.ids, b.ids)
                np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)  # recomputed prefixes
                assert a.spans == b.spans

            swapped = False
            while not swapped:  # where servers are done before the next weights are, once more; bounded by `run`
                running = asyncio.gather(*(engine.generate(each) for each in turns))
                await until(lambda: any(member.in_flight for member in engine.members()))
                later = weights.publish()
                await engine.apply(later)
                for got in await running:
                    versions = [span.version for span in got.spans]
                    assert got.finish is Finish.LENGTH
                    assert versions == sorted(set(versions))
                    swapped |= versions[-1] == later.manifest.version
            assert any("lost" in line for line in told)
            await until(lambda: all(member.state is State.SERVING for member in engine.members()))
            same(*await asyncio.gather(engine.generate(ask(90)), engine.generate(replace(ask(90), rid="again"))))
        finally:
            await asyncio.gather(engine.close(), here.close())

    run(body)


@pytest.mark.slow
def test_a_run_logs_the_same_tokens_wherever_it_generates(tmp_path: Path) -> None:
    """In the process, at one server, behind the router: episodes and metrics of a run at lag 0."""

    def logged(servers: int) -> tuple[dict[str, tuple[Any, ...]], list[dict[str, float]]]:
        config = tiny(tmp_path / str(servers), rollout={"embedded": {"servers": servers}}, steps=3)
        api.train(config)
        found: dict[str, tuple[Any, ...]] = {}
        for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,), from_ordinal=0):
            episode = entry.record.episode  # type: ignore[union-attr]
            found[episode.id] = tuple(
                (turn.ids.tolist(), np.asarray(turn.logprobs).tolist(), turn.spans) for turn in episode.sampled_turns()
            )
        return found, [dict(row) for row in read_metrics(config.folder / "metrics.jsonl")]

    episodes, metrics = logged(0)
    assert len(episodes) >= 3 * 4 * 4
    for servers in (1, 2):
        others, rows = logged(servers)
        assert others == episodes
        assert len(rows) == len(metrics) == 3
        for row, expected in zip(rows, metrics, strict=True):
            figures = {
                name for name in expected if not name.startswith(("time/", "speed/", "checkpoint/", "eval/seconds"))
            }
            assert figures <= row.keys()
            for name in sorted(figures):
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_episodes_finish_while_the_trainer_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a server of its own lag is an overlap: the first step here does not end before another episode is logged."""
    config = tiny(
        tmp_path,
        rollout={"embedded": {"servers": 1, "max_running": 8}, "sampling": {"max_new_tokens": 30}},
        data={"gate": {"max_lag": 2}},
        evaluation={"every": 0},
    )
    waited: list[int] = []
    plain = TorchTrainer.step

    def finished() -> int:
        return len(list(LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,), from_ordinal=0)))

    def step(self: TorchTrainer, batch: TrainBatch, loss: Loss) -> StepStats:
        if not waited:
            before, deadline = finished(), time.monotonic() + 60
            while finished() == before:
                assert time.monotonic() < deadline, "nothing was logged while the trainer computed"
                time.sleep(0.05)
            waited.append(finished() - before)
        return plain(self, batch, loss)

    monkeypatch.setattr(TorchTrainer, "step", step)
    api.train(config)
    assert waited
    assert waited[0] > 0
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert max(row["gate/lag_max"] for row in rows) in (1, 2)
    fate = account(LogReader(config.folder / "log").read(kinds=ACCOUNTED))
    assert fate.complete  # no group was sampled that no batch was left for
