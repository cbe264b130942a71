"""Pacing: the bound, no deadlock and the same credits after a resume, for any sequence of events of a real buffer."""

from __future__ import annotations

import json

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.unit.buffer_cases import SAMPLING, prompts, scored

from sluice.config.data import GateConfig, OnStale, Order
from sluice.data.buffer import Buffer
from sluice.data.filters import equal_rewards
from sluice.data.gate import Gate
from sluice.data.pacing import Pacing
from sluice.data.strategy import GroupStrategy
from sluice.errors import DataError
from sluice.types import (
    GroupRequest,
    Scored,
)


class World:
    """A real gate and buffer; episodes carry the version under which their group was dispatched."""

    def __init__(self, config: GateConfig, groups: int, updates: int) -> None:
        self.gate = Gate(config, groups, updates)
        self.requests: dict[str, GroupRequest] = {}
        self.born: dict[str, int] = {}
        self.done: dict[str, Scored] = {}
        self.step = self.batches = 0
        self.training = False
        self.buffer = self.fresh()

    def fresh(self) -> Buffer:
        strategy = GroupStrategy(prompts(7), samples=2, seed=1)
        return Buffer(self.gate, strategy, sampling=SAMPLING, filters=[equal_rewards(1e-6)])

    def dispatch(self) -> None:
        request = self.buffer.request()
        self.requests[request.id], self.born[request.id] = request, self.step

    def finish(self, pick: int, drops: bool) -> None:
        missing = [(request, sample) for request, samples in self.buffer.unfinished() for sample in samples]
        request, sample = missing[pick % len(missing)]
        one = scored(request, sample, self.born[request.id], 1.0 if drops else float(sample))
        self.done[one.episode.id] = one
        self.buffer.add(one)

    def take(self) -> None:
        for group in self.buffer.take():
            for member in group.members:
                judged = self.gate.judge(member.samples, lambda version: self.step - version.step)
                if self.gate.config.effective_order is Order.DISPATCH:
                    assert judged.lag <= self.gate.config.max_lag, "the bound holds without discarding"
                    assert judged.masked_tokens == 0
                stale = judged.lag > self.gate.config.max_lag
                assert stale == all(not sample.trained.any() for sample in judged.samples), "stale is never trained"
        self.training = True

    def trained(self) -> None:
        self.buffer.trained()
        self.training = False
        self.step += self.gate.updates
        self.batches += 1

    def resume(self) -> None:
        before = self.buffer.want()
        state = json.loads(json.dumps(self.buffer.state_dict()))
        self.buffer = self.fresh()
        self.buffer.load_state_dict(state, self.requests, self.done)
        assert self.buffer.want() == before, "a resume gives the credits of the uninterrupted run"

    def act(self, pick: int, drops: bool) -> None:
        """One of the events that are possible now; that there is none would be a deadlock."""
        possible = [lambda: self.finish(pick // 7, drops)] if self.buffer.unfinished() else []
        possible += [self.dispatch] if self.buffer.want() else []
        possible += [self.trained] if self.training else []
        possible += [self.take] if self.buffer.ready() and not self.training else []
        assert possible, "deadlock"
        possible[pick % len(possible)]()
        assert 0 <= self.buffer.want() == max(0, self.gate.max_alive - self.buffer.alive)
        assert self.buffer.alive <= self.gate.max_alive


CONFIGS = st.one_of(
    st.just(GateConfig(refill_limit=1000)),
    st.builds(
        lambda lag, order, stale: GateConfig(
            max_lag=lag, order=order, on_stale=OnStale.WAIT if order is Order.DISPATCH else stale, refill_limit=1000
        ),
        st.integers(1, 6),
        st.sampled_from(Order),
        st.sampled_from([OnStale.MASK_TOKENS, OnStale.DROP]),
    ),
)
EVENTS = st.lists(st.tuples(st.integers(0, 5000), st.booleans(), st.integers(0, 9)), max_size=80)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(CONFIGS, st.integers(1, 3), st.integers(1, 3), EVENTS)
def test_any_sequence_of_events_keeps_the_bound_and_goes_on(config, groups, updates, events) -> None:
    world = World(config, groups, updates)
    for pick, drops, resumes in events:
        world.act(pick, drops)
        if resumes == 0 and not world.training:
            world.resume()
    goal = world.batches + 2
    for turn in range(400):
        world.act(turn * 13, drops=False)
        if world.batches >= goal:
            return
    raise AssertionError("two more batches are trained, whatever came before")


@pytest.mark.parametrize(
    ("lag", "updates", "limit"), [(0, 1, 4), (1, 1, 8), (3, 1, 16), (1, 2, 4), (2, 2, 8), (5, 2, 12)]
)
def test_limit_and_credits(lag: int, updates: int, limit: int) -> None:
    pacing = Pacing(lag, 4, updates)
    assert pacing.limit == limit
    assert [pacing.credits(alive) for alive in (0, limit - 1, limit, limit + 5)] == [limit, 1, 0, 0]
    with pytest.raises(DataError, match="freed twice"):
        pacing.credits(-1)
    with pytest.raises(DataError, match="no pacing for max_lag = -1"):
        Pacing(-1, 4)


def test_a_bound_that_no_schedule_can_keep_is_refused_with_the_way_out() -> None:
    for order in (None, Order.COMPLETION):
        with pytest.raises(ValidationError, match=r"set gate\.order = 'dispatch', or gate\.on_stale = 'mask_tokens'"):
            GateConfig(max_lag=2, order=order, on_stale=OnStale.WAIT)
    assert GateConfig(max_lag=2, order=Order.DISPATCH).effective_on_stale is OnStale.WAIT
