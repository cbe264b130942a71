"""The gate and the buffer as a pure state machine: order, bound, refill, resume."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.buffer_cases import SAMPLING, prompts, scored

from sluice.config.data import GateConfig, OnStale, Order
from sluice.data import buffer as buffer_module
from sluice.data.buffer import Buffer
from sluice.data.filters import equal_rewards, too_few_valid
from sluice.data.gate import Gate
from sluice.data.strategy import CurriculumStrategy, GroupStrategy
from sluice.errors import DataError
from sluice.types import (
    Group,
    GroupRequest,
    Outcome,
    Scored,
    Version,
)


def buffer(config: GateConfig, *, filters=(), strategy=None, groups_per_step: int = 3) -> Buffer:
    chosen = strategy or GroupStrategy(prompts(7), samples=2, seed=1)
    return Buffer(Gate(config, groups_per_step), chosen, sampling=SAMPLING, filters=filters)


def drive(config: GateConfig, batches: int, seed: int, **kwargs) -> tuple[list[list[str]], list[int]]:
    """Run the buffer against a world that finishes episodes in random order.

    Returns the prompts of each batch and the largest lag in each.
    """
    chance = random.Random(seed)
    one = buffer(config, **kwargs)
    world: list[tuple[GroupRequest, int, int]] = []
    version, taken, lags = 0, [], []
    while len(taken) < batches:
        while one.want():
            request = one.request()
            world += [(request, sample, version) for sample in range(request.n)]
        assert one.alive <= (config.max_lag + 1) * 3
        if one.ready():
            groups = one.take()
            taken.append([group.request.prompt.id for group in groups])
            spans = [m.episode.segments[0].turns[1].spans[0].version.step for g in groups for m in g.members]
            lags.append(version - min(spans))
            while one.want() and chance.random() < 0.5:  # the gate admits while a batch trains
                request = one.request()
                world += [(request, sample, version) for sample in range(request.n)]
            version += 1
            one.trained()
            continue
        request, sample, born = world.pop(chance.randrange(len(world)))
        one.add(scored(request, sample, born))
    return taken, lags


@pytest.mark.parametrize("filters", [(), (equal_rewards(1e-6),)], ids=["all", "refill"])
def test_at_lag_zero_batches_do_not_depend_on_which_episode_finishes_first(filters) -> None:
    runs = [drive(GateConfig(), 6, seed, filters=filters) for seed in range(8)]
    assert all(run[0] == runs[0][0] for run in runs)
    assert all(set(run[1]) == {0} for run in runs)


def test_dynamic_sampling_refills_with_the_next_prompts() -> None:
    (batches, _) = drive(GateConfig(), 2, seed=0, filters=(equal_rewards(1e-6),))
    order = GroupStrategy(prompts(7), samples=2, seed=1)
    asked = [order.next()[0].id for _ in range(12)]
    assert [id for batch in batches for id in batch] == asked[1::2], "even ordinals have equal rewards"


@given(seed=st.integers(0, 10_000), lag=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_in_dispatch_order_pacing_alone_keeps_the_bound(seed: int, lag: int) -> None:
    _, lags = drive(GateConfig(max_lag=lag, order=Order.DISPATCH), 8, seed)
    assert max(lags) <= lag


def test_in_completion_order_a_slow_group_can_be_overtaken() -> None:
    worst = max(max(drive(GateConfig(max_lag=1), 20, seed)[1]) for seed in range(10))
    assert worst > 1, "pacing does not bound completion order: judging by token does"


def test_waiting_gate_refuses_a_broken_bound() -> None:
    gate = Gate(GateConfig(max_lag=1, order=Order.DISPATCH), 1)
    sample = scored(GroupRequest(0, prompts(1)[0], 1, SAMPLING), 0).samples
    assert gate.judge(sample, lambda v: 1).masked_tokens == 0
    with pytest.raises(DataError, match="2 steps behind although the gate waits at max_lag = 1"):
        gate.judge(sample, lambda v: 2)


@pytest.mark.parametrize("policy", [OnStale.MASK_TOKENS, OnStale.DROP])
def test_judging_counts_what_it_takes_out(policy: OnStale) -> None:
    gate = Gate(GateConfig(max_lag=1, on_stale=policy), 1)
    base = scored(GroupRequest(0, prompts(1)[0], 1, SAMPLING), 0).samples[0]
    mixed = base.with_streams(version=np.array([-1, Version(0).code, Version(4).code]))
    verdict = gate.judge((mixed,), lambda v: 4 - v.step)
    assert (verdict.lag, verdict.masked_tokens) == ((4, 1) if policy is OnStale.MASK_TOKENS else (4, 2))
    assert verdict.samples[0]["weight"].tolist() == ([0, 0, 1] if policy is OnStale.MASK_TOKENS else [0, 0, 0])
    assert verdict.dropped == ("" if policy is OnStale.MASK_TOKENS else "stale: lag 4 > 1")


def test_updates_per_batch_shorten_the_queue() -> None:
    config = GateConfig(max_lag=2, on_stale=OnStale.MASK_TOKENS, order=Order.COMPLETION)
    assert Gate(config, 8, updates=1).max_alive == 24
    assert Gate(config, 8, updates=2).max_alive == 16
    assert Gate(config, 8, updates=4).max_alive == 8
    over = GateConfig(max_lag=1, oversample=1.1)
    assert Gate(over, 10).max_alive == 21
    assert Gate(over, 8).max_alive == 17


def test_lag_zero_defaults_and_contradictions() -> None:
    config = GateConfig()
    assert (config.effective_order, config.effective_on_stale) == (Order.DISPATCH, OnStale.WAIT)
    config = GateConfig(max_lag=2)
    assert (config.effective_order, config.effective_on_stale) == (Order.COMPLETION, OnStale.MASK_TOKENS)
    with pytest.raises(ValueError, match="cannot all hold"):
        GateConfig(max_lag=1, order=Order.COMPLETION, on_stale=OnStale.WAIT)
    with pytest.raises(ValueError, match=r"needs gate\.max_lag >= 1"):
        GateConfig(order=Order.COMPLETION)
    for refused in ({}, {"max_lag": 1, "order": Order.DISPATCH}):
        with pytest.raises(ValueError, match="oversample"):
            GateConfig(oversample=1.5, **refused)
    for number in (0.9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="oversample"):
            GateConfig(max_lag=1, oversample=number)


def test_a_task_that_teaches_nothing_stops_the_run_with_a_reason() -> None:
    one = buffer(GateConfig(refill_limit=2), filters=(equal_rewards(1e-6),))

    def flood() -> None:
        for _ in range(100):
            while one.want():
                request = one.request()
                for sample in range(request.n):
                    one.add(scored(request, sample, reward=1.0))

    with pytest.raises(DataError, match="filters dropped 7 groups in a row, the last because equal_rewards: 1"):
        flood()


def test_an_infra_failure_leaves_the_group_but_a_group_without_valid_members_is_dropped() -> None:
    request = GroupRequest(0, prompts(1)[0], 2, SAMPLING)
    good = scored(request, 0)
    dead = Scored(replace(scored(request, 1).episode, outcome=Outcome.INFRA_FAILURE), None)
    group = Group(request, (good, dead))
    assert too_few_valid(1)(group) == ""
    assert too_few_valid(2)(group) == "too_few_valid: 1 of 2"
    assert equal_rewards(1e-6)(Group(request, (dead, dead))) == "equal_rewards: none valid"


def test_an_episode_is_taken_once() -> None:
    one = buffer(GateConfig())
    request = one.request()
    one.add(scored(request, 0))
    with pytest.raises(DataError, match="belongs to no group that waits for it"):
        one.add(scored(request, 0))
    with pytest.raises(DataError, match="belongs to no group"):
        one.add(scored(replace(request, ordinal=99), 0))


def test_state_survives_json_in_the_middle_of_everything() -> None:
    one = buffer(GateConfig(max_lag=1))
    requests = [one.request() for _ in range(one.want())]
    done = {}
    for request, sample in [(requests[0], 0), (requests[2], 0), (requests[2], 1), (requests[4], 1)]:
        finished = scored(request, sample, reward=float(sample))
        done[finished.episode.id] = finished
        one.add(finished)
    state = json.loads(json.dumps(one.state_dict()))
    other = buffer(GateConfig(max_lag=1))
    other.load_state_dict(state, {r.id: r for r in requests}, done)
    assert other.state_dict() == one.state_dict()
    assert other.unfinished() == one.unfinished()
    assert [(r.id, s) for r, s in other.unfinished()] == [
        ("g000000", [1]), ("g000001", [0, 1]), ("g000003", [0, 1]), ("g000004", [0]), ("g000005", [0, 1])
    ]  # fmt: skip
    with pytest.raises(DataError, match="counts group g000001 as dispatched"):
        buffer(GateConfig(max_lag=1)).load_state_dict(state, {requests[0].id: requests[0]}, done)
    del done["g000002.1"]
    with pytest.raises(DataError, match=r"counts episode g000002\.1 as finished, but the log does not have it"):
        buffer(GateConfig(max_lag=1)).load_state_dict(state, {r.id: r for r in requests}, done)


def test_cursor_passes_over_everything_and_resumes_anywhere() -> None:
    straight = GroupStrategy(prompts(5), samples=1, seed=3)
    ids = [straight.next()[0].id for _ in range(15)]
    passes = [ids[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert passes[0] != passes[1]
    for cut in range(15):
        first = GroupStrategy(prompts(5), samples=1, seed=3)
        for _ in range(cut):
            first.next()
        second = GroupStrategy(prompts(5), samples=1, seed=3)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.next()[0].id for _ in range(15 - cut)] == ids[cut:]
    with pytest.raises(DataError, match="runs over 5 prompts, the source has 6"):
        GroupStrategy(prompts(6), samples=1, seed=3).load_state_dict(straight.state_dict())
    with pytest.raises(DataError, match="no prompts to train on"):
        GroupStrategy([], samples=1, seed=3)


def test_curriculum_opens_the_next_level_when_this_one_is_mastered() -> None:
    levels = [prompts(4, "easy"), prompts(4, "hard")]

    def make() -> CurriculumStrategy:
        return CurriculumStrategy(levels, samples=2, seed=0, threshold=0.75, window=4, review=0.25)

    strategy = make()
    asked: list[str] = []

    def play(reward: float, times: int) -> None:
        for _ in range(times):
            prompt, n = strategy.next()
            asked.append(prompt.id)
            request = GroupRequest(len(asked), prompt, n, SAMPLING)
            members = tuple(scored(request, sample, reward=reward) for sample in range(n))
            strategy.observe(Group(request, members))

    play(0.5, 8)
    assert strategy.level == 0
    play(1.0, 2)
    assert strategy.level == 1, "the window's mean reached the threshold"
    assert all(id.startswith("easy") for id in asked)
    saved = json.loads(json.dumps(strategy.state_dict()))
    play(0.0, 40)
    share = sum(id.startswith("easy") for id in asked[10:]) / 40
    assert 0.05 < share < 0.5, "some review of the mastered level"
    again = make()
    again.load_state_dict(saved)
    assert [again.next()[0].id for _ in range(40)] == asked[10:]


def test_a_tighter_bound_asks_again_for_what_cannot_keep_it() -> None:
    """Alive under lag 2 with one group a step: three groups. Under lag 0 one may stay, if none of it is too old."""
    wide = buffer(GateConfig(max_lag=2, order=Order.DISPATCH), groups_per_step=1)
    requests = [wide.request() for _ in range(wide.want())]
    assert len(requests) == 3
    first = scored(requests[0], 0)
    wide.add(first)
    third = scored(requests[2], 1)
    wide.add(third)
    tight = buffer(GateConfig(), groups_per_step=1)
    known = {request.id: request for request in requests}
    tight.load_state_dict(wide.state_dict(), known, {each.episode.id: each for each in (first, third)})
    assert tight.renew(lambda each: False) == [third]
    assert [request.id for request, _ in tight.unfinished()] == [requests[0].id]
    assert tight.want() == 0

    again = buffer(GateConfig(), groups_per_step=1)
    again.load_state_dict(tight.state_dict(), known, {first.episode.id: first})
    assert again.renew(lambda each: True) == [first]
    assert again.want() == 1
    asked = [again.request().prompt for _ in range(3)]
    assert asked == [requests[1].prompt, requests[2].prompt, requests[0].prompt]
    assert again.request().prompt.id not in {request.prompt.id for request in requests}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (GateConfig(max_lag=2, order=Order.DISPATCH), GateConfig(max_lag=1, order=Order.DISPATCH), 1),
        (GateConfig(max_lag=1), GateConfig(max_lag=1, order=Order.DISPATCH), 1),
        (GateConfig(max_lag=1, order=Order.DISPATCH), GateConfig(max_lag=2, order=Order.DISPATCH), 2),
        (GateConfig(max_lag=2, order=Order.DISPATCH), GateConfig(max_lag=2, order=Order.DISPATCH), 3),
    ],
)
def test_what_a_resumed_run_keeps_is_within_its_bound_when_its_turn_comes(before, after, kept: int) -> None:
    """The next group has not begun; the one behind it has, and is just young enough: by then it would be too old."""
    gate, step = Gate(after, 1), 1
    old = buffer(before, groups_per_step=1)
    requests = [old.request() for _ in range(old.want())]
    done = scored(requests[1], 0, version=0, reward=0.0)
    old.add(done)

    def lag(version: Version) -> int:
        return step - version.step

    def too_old(each: Scored) -> bool:
        return lag(next(each.episode.sampled_turns()).spans[0].version) > after.max_lag

    new = buffer(after, groups_per_step=1)
    state = json.loads(json.dumps(old.state_dict()))
    new.load_state_dict(state, {request.id: request for request in requests}, {done.episode.id: done})
    new.renew(too_old)
    left = new.alive
    for _ in range(3):
        while new.want():
            new.request()
        for request, samples in new.unfinished():
            for sample in samples:
                new.add(scored(request, sample, version=step, reward=float(sample)))
        for group in new.take():
            for member in group.members:
                assert gate.judge(member.samples, lag).lag <= after.max_lag
        new.trained()
        step += 1
    assert left == kept


def test_over_sampling_trains_what_finishes_first_and_carries_the_rest_over() -> None:
    """Two groups a batch, lag 1, half as many again: five alive. The straggler is passed over, and is not lost."""
    one = buffer(GateConfig(max_lag=1, oversample=1.5), groups_per_step=2)
    requests = [one.request() for _ in range(one.want())]
    assert len(requests) == 5

    def finish(*places: int) -> None:
        for place in places:
            for sample in range(requests[place].n):
                one.add(scored(requests[place], sample))

    def batch() -> list[str]:
        ids = [group.id for group in one.take()]
        one.trained()
        return ids

    finish(3, 1)
    assert one.ready()
    assert batch() == [requests[3].id, requests[1].id]
    assert one.want() == 2, "the three that are left are carried over"
    requests += [one.request() for _ in range(one.want())]
    finish(6, 2, 4)
    assert batch() == [requests[6].id, requests[2].id], "in the order in which they finished"
    finish(0)
    assert batch() == [requests[4].id, requests[0].id], "what was carried over comes before what finished later"
    assert [request.id for request, _ in one.unfinished()] == [requests[5].id]


@pytest.mark.parametrize("order", Order)
def test_what_an_episode_costs_does_not_depend_on_the_groups_alive(order: Order) -> None:
    """Counted in lines of the buffer that are run, so that no clock decides: with 1,000 engines thousands are alive."""

    def lines(lag: int) -> int:
        one = buffer(GateConfig(max_lag=lag, order=order), filters=[equal_rewards(1e-6)], groups_per_step=4)
        requests = [one.request() for _ in range(one.want())]
        for request in requests[::2]:
            one.add(scored(request, 0, reward=0.0))
        count = 0

        def trace(frame, event, _):
            nonlocal count
            inside = frame.f_code.co_filename == buffer_module.__file__
            count += inside and event == "line"
            return trace if inside else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for request in requests[:2]:
                for sample in range(request.n):
                    if (request, sample) != (requests[0], 0):
                        one.add(scored(request, sample, reward=float(sample)))
                    one.ready()
        finally:
            sys.settrace(before)
        assert one.alive == (lag + 1) * 4
        return count

    assert 0 < lines(400) <= lines(10)
