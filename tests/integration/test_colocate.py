"""Engine and trainer taking turns on the same devices: the run that it is with devices of their own, and failures."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.sglang_server import write_tiny_model
from tests.integration.sglang_weights import TOLERANCE, Weights, logprobs
from tests.integration.test_embedded_servers import ask, fleet, same, until, weights
from tests.tiny import tiny

from sluice.config import RunConfig
from sluice.config.rollout import EmbeddedConfig
from sluice.config.sglang import SGLangConfig
from sluice.config.train import TrainConfig
from sluice.errors import CapabilityError, ConfigError, EngineError
from sluice.log import ACCOUNTED, EpisodeRecord, Kind, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.obs.timing import PhaseTimer
from sluice.obs.view import NullView
from sluice.orchestrate import api
from sluice.orchestrate.beside import Beside
from sluice.orchestrate.pool import Shared, Stage
from sluice.rollout.engines.base import Memory
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.rollout.engines.sglang import SGLangEngine
from sluice.rollout.engines.sglang.member import State
from sluice.train.backends.torch import TorchTrainer

pytestmark = pytest.mark.timeout(300)
__all__ = ["weights"]

OUTSIDE = ("time/", "speed/", "checkpoint/", "eval/seconds", "engine/", "switch/", "memory/")
"""Metrics of where and how fast, not of what."""


def recipe(folder: Path, *, colocate: bool, **changes: Any) -> RunConfig:
    return tiny(folder, steps=3, evaluation={"every": 3}, placement={"colocate": colocate}, **changes)


def logged(config: RunConfig) -> dict[str, tuple[list[int], list[float], str]]:
    """Tokens, log-probs and reward of every episode."""
    found: dict[str, tuple[list[int], list[float], str]] = {}
    for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,)):
        assert isinstance(entry.record, EpisodeRecord)
        episode = entry.record.episode
        turns = list(episode.sampled_turns())
        ids = [int(each) for turn in turns for each in turn.ids]
        found[episode.id] = ids, [float(p) for turn in turns for p in turn.logprobs], str(turns[-1].spans)
    return found


def equal(a: RunConfig, b: RunConfig) -> None:
    """What was sampled bit for bit, what was measured to 1e-6."""
    assert logged(a) == logged(b)
    rows = [read_metrics(config.folder / "metrics.jsonl") for config in (a, b)]
    assert len(rows[0]) == len(rows[1]) == 3
    for one, other in zip(*rows, strict=True):
        assert {n for n in one if not n.startswith(OUTSIDE)} == {n for n in other if not n.startswith(OUTSIDE)}
        for name in (name for name in one if not name.startswith(OUTSIDE)):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6, atol=1e-6, err_msg=name)


def within(rows: Sequence[Mapping[str, Any]], lag: int) -> bool:
    """Whether what was too old for the loss was taken out of it."""
    return all(row["gate/lag_max"] <= lag or row["gate/masked_tokens"] > 0 for row in rows)


@pytest.mark.parametrize("servers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_at_lag_0_it_is_the_run_with_devices_of_their_own(tmp_path: Path, servers: int) -> None:
    """With the engine in this process, and with two servers behind the router."""
    engine = {"rollout": {"embedded": {"servers": servers}}}
    runs = [recipe(tmp_path / str(shares), colocate=shares, **engine) for shares in (False, True)]
    for config in runs:
        api.train(config, view=NullView())
    equal(*runs)
    for row in read_metrics(runs[1].folder / "metrics.jsonl"):
        assert {f"switch/{stage}_seconds" for stage in Stage} <= row.keys()
        assert row["memory/trainer_peak_gib"] > 0
        assert row["time/switch"] > 0
    assert account(LogReader(runs[1].folder / "log").read(kinds=ACCOUNTED)).complete


@pytest.mark.slow
def test_ranks_and_servers_on_the_same_devices(tmp_path: Path) -> None:
    """Two ranks and two servers, apart and colocated: tokens identical, metrics within 1e-6."""
    sizes = {"rollout": {"embedded": {"servers": 2}}, "train": {"ranks": 2}}
    runs = [recipe(tmp_path / str(shares), colocate=shares, **sizes) for shares in (False, True)]
    for config in runs:
        api.train(config, view=NullView())
    equal(*runs)


@pytest.mark.slow
def test_a_run_goes_on_under_another_placement(tmp_path: Path) -> None:
    """Colocated at lag 0, then apart at lag 2, then colocated at lag 2 and at last at lag 0: nothing is lost."""
    apart = {"rollout": {"embedded": {"servers": 2}}, "data": {"gate": {"max_lag": 2}}}
    plan: list[tuple[bool, dict[str, Any]]] = [(True, {}), (False, apart), (True, apart), (True, {})]
    for number, (shares, changes) in enumerate(plan):
        config = tiny(tmp_path, **{**changes, "steps": 2 * number + 2, "placement": {"colocate": shares}})
        api.train(config, view=NullView(), resume=number > 0)
        log = LogReader(config.folder / "log")
        fate = account(log.read(kinds=ACCOUNTED))
        assert (fate.decided_twice, fate.logged_twice, fate.unlogged) == ((), (), ())
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert within(rows, 2)
    assert [row["gate/lag_max"] for row in rows[-2:]] == [0.0, 0.0]


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(240):
            await body()

    asyncio.run(bounded())


# ── the engine's side ───────────────────────────────────────────────────────────────────────────────────


async def still(drawn: list[int]) -> int:
    """How many there are once those that were on their way from a server have come."""
    count = -1
    while len(drawn) != count:
        count = len(drawn)
        await asyncio.sleep(0.3)
    return count


def test_memory_is_given_up_and_turns_go_on(tmp_path: Path, weights: Weights) -> None:
    """A turn that runs when the memory goes is continued under the next version, from the tokens it had."""

    async def body() -> None:
        here = EmbeddedEngine.from_model(weights.model, None, EmbeddedConfig(kv_tokens=4096, context_length=256))
        there = fleet(tmp_path, 2)
        try:
            await asyncio.gather(here.start(), there.start())
            first = weights.publish()
            await asyncio.gather(here.apply(first), there.apply(first))
            expected = await here.generate(ask(0, tokens=200))
            for engine in (here, there):
                drawn: list[int] = []
                turn = asyncio.create_task(engine.generate(ask(0, tokens=200, on_tokens=drawn.extend)))
                await until(lambda drawn=drawn: len(drawn) > 3)
                await engine.drain()
                told = await still(drawn)
                await engine.release_memory()
                if engine is here:
                    assert here.weights == {}
                    with pytest.raises(EngineError, match=r"without its (kv_cache|weights), which was released"):
                        await here.resume()
                    with pytest.raises(EngineError, match="no memory for weights"):
                        await here.apply(first)
                assert not turn.done()
                assert len(drawn) == told < 200
                await engine.resume_memory(Memory.WEIGHTS)
                await engine.apply(first)
                await engine.resume_memory(Memory.KV)
                assert len(drawn) == told
                await engine.resume()
                same(await turn, expected)
        finally:
            await asyncio.gather(here.close(), there.close())

    run(body)


@pytest.mark.slow
def test_a_server_that_dies_while_its_memory_is_away(tmp_path: Path, weights: Weights) -> None:
    """It is not started until the devices are the engines' again, and then serves the new version."""

    async def body() -> None:
        told: list[str] = []
        engine = fleet(tmp_path, 2, told)
        try:
            await engine.start()
            await engine.apply(weights.publish())
            await engine.release_memory()
            lost, kept = engine.members()
            process = lost.process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: lost.state is State.AWAY and lost.returning)
            life = lost.life
            for _ in range(20):  # what would start it has had its turns
                await asyncio.sleep(0.05)
            assert lost.life == life
            await engine.resume_memory(Memory.WEIGHTS)
            newest = weights.publish()
            await engine.apply(newest)
            await engine.resume_memory(Memory.KV)
            await engine.resume()
            await until(lambda: lost.state is State.SERVING)
            assert lost.life == life + 1
            for number in range(8):
                request = ask(number, sampling={"temperature": 1.0})
                got = await engine.generate(request)
                assert [span.version for span in got.spans] == [newest.manifest.version]
                expected = logprobs(weights, request.ids.tolist(), got.ids.tolist())
                np.testing.assert_allclose(got.logprobs, expected, rtol=0, atol=TOLERANCE)
            assert kept.state is State.SERVING
        finally:
            await engine.close()

    run(body)


# ── the state machine ───────────────────────────────────────────────────────────────────────────────────


def test_no_stage_can_be_left_out(tmp_path: Path) -> None:
    """Each acknowledged transition leads to the next one only; a failure leaves the stage and says where it was."""

    async def body() -> None:
        folder = tmp_path / "model"
        write_tiny_model(folder)
        weights = Weights(folder, tmp_path / "weights")
        engine = EmbeddedEngine.from_model(weights.model, None, EmbeddedConfig(kv_tokens=4096, context_length=256))
        await engine.start()
        pool = Shared(engine, engine, PhaseTimer(), "cpu")
        trainer = TorchTrainer(TrainConfig(), folder, total_steps=1, seed=0)
        with pytest.raises(RuntimeError, match="serving; it goes on to draining, not to training"):
            await pool.occupied(trainer, None, Beside(apart=False))
        await pool.vacate()
        assert pool.stage is Stage.RELEASED
        with pytest.raises(RuntimeError, match="released; it goes on to training, not to draining"):
            await pool.vacate()
        await pool.occupied(trainer, None, Beside(apart=False))
        with pytest.raises(RuntimeError, match="training; it goes on to offloaded, not to synced"):
            await pool.serve(weights.publish())
        await pool.rest()
        await engine.close()
        with pytest.raises(EngineError, match="was closed"):
            await pool.serve(weights.publish())
        assert pool.stage is Stage.OFFLOADED

    run(body)


def test_a_failure_says_between_which_stages_it_was(tmp_path: Path) -> None:
    async def body() -> None:
        write_tiny_model(tmp_path / "model")
        engine = EmbeddedEngine.from_model(tmp_path / "model", None, EmbeddedConfig(kv_tokens=4096, context_length=256))
        await engine.start()
        pool = Shared(engine, engine, PhaseTimer(), "cpu")
        await engine.close()
        with pytest.raises(EngineError, match="was closed") as caught:
            await pool.vacate()
        assert caught.value.__notes__ == ["while the shared devices went from serving to draining"]
        assert pool.stage is Stage.SERVING

    run(body)


def test_an_engine_that_keeps_its_memory_is_refused() -> None:
    engine = SGLangEngine("http://127.0.0.1:1", SGLangConfig())
    with pytest.raises(CapabilityError, match=r"placement\.colocate asks for"):
        Shared(engine, engine, PhaseTimer(), "cpu")


def test_a_plan_that_does_not_fit_is_refused_before_anything_loads(tmp_path: Path) -> None:
    huge = {"rollout": {"embedded": {"kv_tokens": 10**12}}}
    config = recipe(tmp_path, colocate=True, **huge)
    with pytest.raises(ConfigError, match=r"while it generates the run needs .* GiB there: .*KV cache of the engines"):
        api.train(config, view=NullView())
    assert not (config.folder / "engines").exists()


# ── real SGLang ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("colocate", [True, False])
@pytest.mark.parametrize("lag", [0, 2])
def test_sglang_by_turns_and_apart(tmp_path: Path, lag: int, colocate: bool) -> None:
    """On a CPU its servers keep their memory; every other transition is the one of an accelerator."""
    sglang = {
        "build": "cpu", "sync": "tensor", "groups": [{"args": {"max-total-tokens": 4096}}], "start_seconds": 300,
    }  # fmt: skip
    config = tiny(
        tmp_path, steps=10, evaluation={"every": 0, "greedy": False}, placement={"colocate": colocate},
        rollout={"engine": "sglang", "context_length": 64, "sglang": sglang}, data={"gate": {"max_lag": lag}},
    )  # fmt: skip
    api.train(config, view=NullView())
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert within(rows, lag)
    if lag == 0:
        assert max(row["mismatch/mean_abs"] for row in rows) <= 1e-5
    assert account(LogReader(config.folder / "log").read(kinds=ACCOUNTED)).complete
