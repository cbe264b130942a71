"""Servers that come and go while they are used: real ones of the embedded engine behind the real router."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from benchmarks.chaos_log import lags
from tests.integration.sglang_server import write_tiny_model
from tests.integration.sglang_weights import Weights
from tests.integration.test_embedded_servers import SIZES, ask, cmd, fleet, run, until
from tests.tiny import tiny

from sluice.config.rollout import EmbeddedConfig
from sluice.config.run import RunConfig
from sluice.errors import ConfigError
from sluice.log import ACCOUNTED, Kind, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api, control
from sluice.orchestrate.control import Standing
from sluice.rollout.engines.base import GenerateRequest, Generation
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.rollout.engines.sglang import keeper
from sluice.rollout.engines.sglang.fleet import SGLangFleet
from sluice.rollout.engines.sglang.member import Member

pytestmark = pytest.mark.slow


async def settled(engine: SGLangFleet) -> None:
    await until(lambda: not engine.elastic.strength.starting and not engine.elastic.strength.leaving)


async def all_busy(engine: SGLangFleet) -> None:
    """Until every server runs a turn. Those that do not stream are counted at the fleet only when they answer."""
    async with httpx.AsyncClient(timeout=30) as client:
        for member in engine.members():
            while not (await client.get(f"{member.url}/get_load")).json()[0]["num_reqs"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def frozen_until_cut(member: Member) -> None:
    """Its process stands still until the fleet cuts its turns: else they may have ended before."""
    pid, pauses = member.process.pid, member.control.num_pauses  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)
    try:
        await until(lambda: member.control.num_pauses > pauses)
    finally:
        os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def compared(
    folder: Path, servers: int, told: list[str], **options: Any
) -> AsyncIterator[tuple[SGLangFleet, list[GenerateRequest], list[Generation]]]:
    """A fleet, turns for it, and what the engine in this process draws for them under the same weights."""
    write_tiny_model(folder / "model")
    weights = Weights(folder / "model", folder / "weights")
    here = EmbeddedEngine.from_model(weights.model, None, EmbeddedConfig(**SIZES))
    engine = fleet(folder, servers, told, **options)
    try:
        await engine.start()
        published = weights.publish()
        await asyncio.gather(engine.apply(published), here.apply(published))
        turns = [ask(number, tokens=200, routing_key=f"e{number}") for number in range(24)]
        yield engine, turns, await asyncio.gather(*(here.generate(each) for each in turns))
    finally:
        await asyncio.gather(engine.close(), here.close())


def test_one_to_three_to_one_under_turns(tmp_path: Path) -> None:
    """Every turn is the one that the engine in this process draws, wherever its parts were drawn."""

    async def body() -> None:
        told: list[str] = []
        async with compared(tmp_path, 1, told) as (engine, turns, expected):
            running = asyncio.gather(*(engine.generate(each) for each in turns))
            engine.elastic.scale(3)
            await settled(engine)
            alike(await running, expected)
            assert engine.elastic.strength.serving == 3

            running = asyncio.gather(*(engine.generate(each) for each in turns))
            await all_busy(engine)
            leaving = [member for member in engine.members() if member.name != "embedded-0"]
            cuts = [asyncio.create_task(frozen_until_cut(member)) for member in leaving]
            await asyncio.sleep(0)
            engine.elastic.scale(1)
            await asyncio.gather(*cuts)
            await settled(engine)
            got = await running
            alike(got, expected)
            assert [member.name for member in engine.members()] == ["embedded-0"]
            assert engine.figures()["engine/resumed_turns"] > 0
            assert {each.engine for each in got} == {"embedded-0"}
            assert not engine.elastic.faults
            assert not [line for line in told if "lost" in line]
            servers = [each for each in psutil.Process().children(recursive=True) if "embedded.server" in
                       " ".join(cmd(each))]  # fmt: skip
            assert len(servers) == 1

    run(body)


def alike(got: Sequence[Generation], expected: Sequence[Generation]) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)  # recomputed prefixes
        assert a.spans == b.spans
        assert a.finish is b.finish


def test_a_server_that_gets_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM from outside: its turns come back as tokens and go on elsewhere, and another one takes its place."""
    monkeypatch.setattr(keeper, "LEASE_SECONDS", 0.1)

    async def body() -> None:
        told: list[str] = []
        async with compared(tmp_path, 2, told, restarts=0) as (engine, turns, expected):
            running = asyncio.gather(*(engine.generate(each) for each in turns))
            await all_busy(engine)
            (first, _) = engine.members()
            os.kill(first.process.pid, signal.SIGTERM)  # type: ignore[union-attr]
            alike(await running, expected)
            await until(lambda: f"{first.name}: serving again" in told)
            assert f"{first.name}: lost: it was told to end" in told
            assert engine.figures()["engine/restarts"] == 0

    run(body)


GATE = '''
import asyncio, pathlib
calls = 0


async def gated(prompt, answer):
    """A coin; from some calls on it waits for a file, so that the run does not end before it was scaled."""
    global calls
    calls += 1
    for after, name in ((40, "more"), (200, "fewer")):
        while calls > after and not (pathlib.Path({folder!r}) / name).exists():
            await asyncio.sleep(0.05)
    return float(len(answer) % 2)
'''


def scaled_while_it_trains(config: RunConfig, more: int = 3, fewer: int = 2) -> list[float]:
    """Run a recipe with `gated` rewards from one server to more to fewer. Returns how many served, batch by batch."""
    failed: list[BaseException] = []

    def drive() -> None:
        try:
            api.train(config, view=NullView())
        except BaseException as error:  # noqa: BLE001  (raised below)
            failed.append(error)

    folder, thread = config.folder, Thread(target=drive)
    thread.start()
    try:
        deadline = time.monotonic() + 240
        while (found := Standing.read(folder)) is None or not found.serving:
            assert thread.is_alive(), failed
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert str(control.standing(folder)) == "1 of 1 servers serve"
        assert control.scale(folder, more, seconds=240).serving == more
        (folder.parent / "more").touch()
        while not any(row["engine/servers"] == more for row in read_metrics(folder / "metrics.jsonl")):
            assert thread.is_alive(), failed
            time.sleep(0.1)
        assert control.scale(folder, fewer, seconds=240).serving == fewer  # while it trains on what all of them draw
    finally:
        for name in ("more", "fewer"):
            (folder.parent / name).touch()
        thread.join(400)
    assert not thread.is_alive()
    assert not failed
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, config.steps + 1))
    log = LogReader(folder / "log")
    assert max(lags(log.read(kinds=(Kind.VERSION, Kind.EPISODE, Kind.DISPOSITION)), 2)) <= 2
    fate = account(log.read(kinds=ACCOUNTED))
    assert fate.complete, "an episode was lost, trained twice or drawn twice"
    assert not list(log.read(kinds=(Kind.FAULT,)))
    with pytest.raises(ConfigError, match="no run is under way"):
        control.standing(folder)
    return [row["engine/servers"] for row in rows]


def gated(folder: Path, **changes: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gate.py").write_text(GATE.format(folder=str(folder / "runs")))
    base: dict[str, Any] = {
        "rewards": [{"type": "python", "path": f"{folder / 'gate.py'}:gated", "seconds": 300}],
        "rollout": {"embedded": {"servers": 1}},
        "data": {"gate": {"max_lag": 2}},
        "evaluation": {"every": 0},
        "steps": 20,
    }
    return tiny(folder, **{**base, **changes})


def test_a_run_is_scaled_while_it_trains(tmp_path: Path) -> None:
    """From one server to three to two by the command's own function: nothing lost, the bound on lag kept."""
    config = gated(tmp_path)
    served = scaled_while_it_trains(config)
    assert served[-1] == 2
    assert 3 in served
    assert (config.folder / "engines" / "embedded-2.log").exists()


@pytest.mark.timeout(600)
def test_a_run_of_sglang_servers_is_scaled_while_it_trains(tmp_path: Path) -> None:
    """From one to two to one; the newcomer has a part in what is trained."""
    sglang = {"build": "cpu", "groups": [{"args": {"max-total-tokens": 4096}}], "start_seconds": 240}
    rollout = {"engine": "sglang", "context_length": 64, "sglang": sglang}
    config = gated(tmp_path, rollout=rollout)
    served = scaled_while_it_trains(config, 2, 1)
    assert served[-1] == 1
    assert 2 in served
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert max(row["mismatch/mean_abs"] for row in rows if row["gate/lag_max"] == 0) <= 1e-5
    assert rows[-1]["engine/requests/regular-1"] > 0
