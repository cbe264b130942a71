"""The simulator: the same by seed, no token lost, the gate's bound, and the cases that can be worked out by hand."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks import simulate as command
from benchmarks import simulated_runs
from benchmarks.simulator import Lengths, Outlook, World, simulate

from sluice.config.data import GateConfig, OnStale, Order

ROOT = Path(__file__).parents[2]
CONSTANT = Lengths(median=100, tail=1)
TAILED = Lengths(median=100, tail=8, limit=4000)
BUSY = World(
    3, 4, 6, samples=4, lengths=TAILED, step_seconds=0.02, sequence_seconds=0.002, request_seconds=0.1,
    turns=3, tool_seconds=0.5, train_seconds=3.0, token_seconds=0.0001, publish_seconds=0.3, sync_seconds=0.2,
    batches=9,
)  # fmt: skip
"""Everything that a world can have."""
GATES = [
    GateConfig(),
    *(GateConfig(max_lag=lag, order=Order.DISPATCH) for lag in (1, 3)),
    *(GateConfig(max_lag=lag, on_stale=stale) for lag in (1, 3) for stale in (OnStale.MASK_TOKENS, OnStale.DROP)),
    *(GateConfig(max_lag=1, on_stale=stale, oversample=4) for stale in (OnStale.MASK_TOKENS, OnStale.DROP)),
]


def name(gate: GateConfig) -> str:
    return f"{gate.max_lag}-{gate.effective_order}-{gate.effective_on_stale}-{gate.oversample:g}"


def idle(outlook: Outlook) -> tuple[float, float, float]:
    figures = outlook.figures()
    return figures["engine_idle"], figures["slot_idle"], figures["trainer_idle"]


def test_a_world_is_decided_by_its_seed() -> None:
    world = replace(BUSY, gate=GateConfig(max_lag=1), spread=0.7)
    first, again, other = simulate(world), simulate(world), simulate(replace(world, seed=1))
    assert first == again
    assert first.figures() != other.figures()


@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize("spread", [1.0, 0.6])
@pytest.mark.parametrize("gate", [pytest.param(gate, id=name(gate)) for gate in GATES])
def test_every_token_is_trained_masked_dropped_or_in_flight(gate: GateConfig, spread: float, finite: bool) -> None:
    outlook = simulate(replace(BUSY, gate=gate, spread=spread, finite=finite))
    tally = outlook.whole
    assert tally.sampled == pytest.approx(tally.trained + tally.masked + tally.dropped + outlook.in_flight, abs=1e-6)
    assert sum(tally.lags.values()) == tally.trained
    assert (tally.groups_filtered > 0) == (spread < 1)
    if finite and spread == 1:
        assert outlook.in_flight == 0, "nothing is sampled that no batch is left to train"


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("gate", [pytest.param(gate, id=name(gate)) for gate in GATES])
def test_what_is_trained_is_within_the_bound(gate: GateConfig, updates: int) -> None:
    figures = simulate(replace(BUSY, gate=gate, updates=updates)).figures()
    assert figures["lag_max_trained"] <= gate.max_lag
    waits = gate.effective_on_stale is OnStale.WAIT
    stale = figures["tokens_masked"] + figures["tokens_dropped"]
    assert (stale > 0) == (figures["lag_max_seen"] > gate.max_lag)
    if waits:
        assert stale == 0, "dispatch order keeps the bound without discarding"
    if gate.oversample > 1:
        assert stale > 0, "too many groups under way, and some are too old"


def test_lag_zero_does_not_overlap() -> None:
    """While the trainer works no engine does: the time of a batch is the sum of both."""
    outlook = simulate(replace(BUSY, turns=1))
    tally = outlook.whole
    assert tally.waiting + tally.training + tally.syncing == pytest.approx(tally.seconds)
    assert set(tally.lags) == {0}
    for engines in (1, 3):
        world = replace(BUSY, engines=engines, turns=1, gate=GateConfig(max_lag=1))
        ahead = simulate(world).whole
        assert ahead.seconds < ahead.engine_busy / engines + ahead.training + ahead.syncing, "lag 1 does overlap"
    alone = simulate(replace(BUSY, engines=1, turns=1, request_seconds=0.0)).whole
    assert alone.engine_busy == pytest.approx(alone.waiting), "the engine works exactly while the trainer waits"


def test_constant_lengths_by_hand() -> None:
    """8 episodes of 100 tokens in 4 slots: two waves of 100 steps of 0.02 + 4 · 0.005 s = 8 s; train 6 s, sync 2 s."""
    world = World(
        1, 4, 2, samples=4, lengths=CONSTANT, step_seconds=0.02, sequence_seconds=0.005,
        train_seconds=5, publish_seconds=1, sync_seconds=2, batches=5,
    )  # fmt: skip
    figures = simulate(world).figures()
    assert figures["seconds_per_batch"] == pytest.approx(16)
    assert figures["engine_idle"] == pytest.approx(6 / 16)
    assert figures["slot_idle"] == pytest.approx(6 / 16)
    assert figures["trainer_idle"] == pytest.approx(8 / 16)
    assert figures["syncing"] == pytest.approx(2 / 16)
    assert figures["trained_tokens_per_second"] == pytest.approx(800 / 16)
    late = simulate(replace(world, request_seconds=0.5)).figures()
    assert late["trainer_idle"] == pytest.approx(8.5 / 16.5)
    half = simulate(replace(world, slots=16)).figures()  # one wave of 100 · (0.02 + 8 · 0.005) s, half of the slots
    assert half["trainer_idle"] == pytest.approx(6 / 14)
    assert half["slot_idle"] == pytest.approx(1 - (6 / 2 + 2) / 14)


def test_constant_lengths_ahead_by_hand() -> None:
    """At lag 1 the slower of the two sets the pace once the first batch is there, and nobody else waits for it."""
    world = World(1, 8, 2, GateConfig(max_lag=1), samples=4, lengths=CONSTANT, train_seconds=6, batches=12, warmup=2)
    figures = simulate(replace(world, step_seconds=0.04)).figures()  # 4 s of sampling in 6 s of training
    assert figures["seconds_per_batch"] == pytest.approx(6)
    assert idle(simulate(replace(world, step_seconds=0.04))) == pytest.approx((2 / 6, 2 / 6, 0))
    assert figures["lag_histogram"] == {"1": 10 * 800}
    slow = simulate(replace(world, step_seconds=0.12)).figures()  # 12 s of sampling
    assert slow["engine_idle"] == pytest.approx(0, abs=1e-9)
    assert slow["trainer_idle"] == pytest.approx(1 / 2, abs=0.01)


@pytest.mark.parametrize("train_seconds", [0.5, 2.0, 9.0])
def test_more_lag_leaves_the_trainer_no_more_idle_with_constant_lengths(train_seconds: float) -> None:
    world = World(2, 4, 2, samples=4, lengths=CONSTANT, train_seconds=train_seconds, sync_seconds=0.1, batches=12)
    found = [idle(simulate(replace(world, gate=GateConfig(max_lag=lag))))[2] for lag in range(6)]
    assert all(more <= less + 1e-9 for less, more in itertools.pairwise(found)), found
    assert found[1] < found[0]


def test_a_tool_frees_the_slot_and_holds_the_episode() -> None:
    world = World(1, 1, 1, samples=2, lengths=CONSTANT, step_seconds=0.1, batches=40)
    without, with_tool = simulate(world).figures(), simulate(replace(world, turns=2, tool_seconds=3.0)).figures()
    assert without["seconds_per_batch"] == pytest.approx(20)
    assert 20 < with_tool["seconds_per_batch"] < 20 + 2 * 3.0, "the other sequence is decoded meanwhile"
    assert with_tool["tokens_trained"] == without["tokens_trained"]


def test_lengths_are_lognormal_or_those_that_were_measured() -> None:
    noise = np.random.default_rng(0)
    drawn = np.concatenate([Lengths(500, 6, 100_000).draw(noise, 8, 0) for _ in range(4000)])
    median, p99 = np.percentile(drawn, [50, 99])
    assert median == pytest.approx(500, rel=0.05)
    assert p99 / median == pytest.approx(6, rel=0.1)
    assert max(Lengths(500, 6, 700).draw(noise, 200, 0)) == 700
    assert [Lengths(measured=((3, 7), (5, 6))).draw(noise, 2, i) for i in range(3)] == [[3, 7], [5, 6], [3, 7]]


def test_the_command_prints_the_figures() -> None:
    flags = ["one", "--engines", "2", "--groups", "4", "--batches", "3"]
    flags += ["--warmup", "1", "--max-lag", "2", "--on-stale", "drop", "--median", "50"]
    call = [sys.executable, "-m", "benchmarks.simulate", *flags]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    said = json.loads(done.stdout)
    assert said["world"]["gate"] == {"max_lag": 2, "on_stale": "drop", "oversample": 1.0, "refill_limit": 20}
    assert said["figures"]["episodes"] == 2 * 4 * 8
    assert said["figures"]["lag_max_trained"] <= 2


def test_a_run_is_imitated_from_what_it_logged() -> None:
    """A simulated run stands in for the real one: its pace is found again, and then its seconds."""
    case = simulated_runs.CASES["lag-0"]
    noise = np.random.default_rng(0)
    groups = {g: [int(each) for each in noise.geometric(0.02, simulated_runs.SAMPLES)] for g in range(8 * 5)}
    pace = (0.3, 0.01, 0.002)
    found = simulated_runs.Run(
        [{"time/train": 1.5, "time/other": 0.5, "time/publish": 0.25} for _ in range(5)],
        {g: [(length, 0.0) for length in members] for g, members in groups.items()},
    )
    world = simulated_runs.imitate(case, found, pace)
    assert (world.train_seconds, world.publish_seconds) == (2.0, 0.25)
    logged: dict[int, list[tuple[int, float]]] = {}
    for batch in range(5):
        members = [length for g in range(8 * batch, 8 * batch + 8) for length in groups[g]]
        ends = {0: pace[0]}  # by hand: all start together, and a step takes longer the more are left
        for step in range(1, max(members) + 1):
            ends[step] = ends[step - 1] + pace[1] + pace[2] * sum(length >= step for length in members)
        logged |= {g: [(length, ends[length]) for length in groups[g]] for g in range(8 * batch, 8 * batch + 8)}
    found = simulated_runs.Run(found.rows, logged)
    assert simulated_runs.calibrate(found) == pytest.approx(pace)
    assert simulated_runs.episode_seconds(simulate(world)) == pytest.approx(found.episode_seconds)
    half = (0.15, 0.005, 0.001)
    assert simulated_runs.own_pace(case, found, half) == pytest.approx(pace, rel=1e-4)


def test_the_table_holds_every_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "WINDOW", 40)
    rows = command.rows_of([4], (2.0,))
    text = command.table(rows, "engines")
    assert len(rows) == 1 + 2 * len(command.POLICIES)
    assert len(text.splitlines()) == 2 + len(rows)
    best = {lag: max(each["trained_tokens_per_second"] for each in rows if each["max_lag"] == lag) for lag in (0, 1)}
    assert best[1] > best[0]
    command.keep(tmp_path, "a", 1)
    command.keep(tmp_path, "b", rows)
    assert json.loads((tmp_path / "simulate.json").read_text()) == {"a": 1, "b": rows}
