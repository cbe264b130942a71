"""Pacing when a batch is several optimizer steps, and versions change in the middle of answers.

A real gate, buffer and lineage are taken through what the loop does, with episodes that end in any order and at any
time: what ends while a batch trains waits in an inbox, as in a run. Every token carries the version that was in use
when it was drawn.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.buffer_cases import SAMPLING, finished, prompts

from sluice.config.data import GateConfig, OnStale, Order
from sluice.data.buffer import Buffer
from sluice.data.filters import equal_rewards
from sluice.data.gate import Gate
from sluice.data.strategy import GroupStrategy
from sluice.types import (
    Group,
    GroupRequest,
    Scored,
    Version,
    VersionSpan,
)
from sluice.weights.lineage import Lineage

PROMPTS = prompts(5)
GOAL = 3
"""Batches that must still be trained, whatever came before."""


@dataclass(slots=True)
class Answer:
    """An episode under way: which version drew each of its tokens so far."""

    request: GroupRequest
    sample: int
    versions: list[Version] = field(default_factory=list[Version])

    def finish(self, reward: float) -> Scored:
        n = len(self.versions)
        edges = [i for i in range(n) if i == 0 or self.versions[i] != self.versions[i - 1]]
        ends = [*edges[1:], n]
        spans = tuple(VersionSpan(a, b, self.versions[a]) for a, b in zip(edges, ends, strict=True))
        return finished(self.request, self.sample, spans, reward)


class World:
    """The loop's order of things; which answer goes on, ends or is rewarded alike is up to the test."""

    def __init__(self, config: GateConfig, groups: int, updates: int, samples: int) -> None:
        self.gate, self.samples = Gate(config, groups, updates), samples
        self.lineage = Lineage()
        self.version = self.lineage.name(0, None, "0")
        self.running: list[Answer] = []
        self.inbox: deque[Scored] = deque()
        self.requests: dict[str, GroupRequest] = {}
        self.done: dict[str, Scored] = {}
        self.training = False
        self.lags: list[int] = []
        self.buffer = self.fresh()
        self.dispatch()

    def fresh(self) -> Buffer:
        strategy = GroupStrategy(PROMPTS, samples=self.samples, seed=1)
        filters = [equal_rewards(1e-6)] if self.samples > 1 else []
        return Buffer(self.gate, strategy, sampling=SAMPLING, filters=filters)

    def dispatch(self) -> None:
        for _ in range(self.buffer.want()):
            request = self.buffer.request()
            self.requests[request.id] = request
            self.running += [Answer(request, sample, [self.version]) for sample in range(request.n)]

    def draw(self, pick: int) -> None:
        self.running[pick % len(self.running)].versions.append(self.version)

    def finish(self, pick: int, alike: bool) -> None:
        answer = self.running.pop(pick % len(self.running))
        answer.versions.append(self.version)
        scored = answer.finish(1.0 if alike else float(answer.sample))
        self.done[scored.episode.id] = scored
        self.inbox.append(scored)

    def take_in(self) -> None:
        """One turn of `Loop._fill`."""
        self.buffer.add(self.inbox.popleft())
        self.dispatch()

    def begin(self) -> None:
        groups = self.buffer.take()
        self.dispatch()
        for group in groups:
            self.judge(group)
        self.training = True

    def judge(self, group: Group) -> None:
        config = self.gate.config
        for member in group.members:
            judged = self.gate.judge(member.samples, self.lineage.lag)
            sample = judged.samples[0]
            sampled, lag = sample["version"] >= 0, sample["lag"]
            assert np.array_equal(lag[sampled], self.version.step - (sample["version"][sampled] >> 20))
            within = sampled & (lag <= config.max_lag)
            if config.effective_on_stale is OnStale.DROP and judged.lag > config.max_lag:
                within[:] = False
            assert np.array_equal(sample.trained, within), "all within the bound is trained, and nothing else"
            assert judged.masked_tokens == np.count_nonzero(sampled & ~within)
            if config.effective_order is Order.DISPATCH:
                assert judged.lag <= self.gate.pacing.batches_ahead * self.gate.updates <= config.max_lag
            self.lags += lag[sample.trained].tolist()

    def end(self) -> None:
        self.buffer.trained()
        self.version = self.lineage.name(self.version.step + self.gate.updates, self.version, "0")
        self.training = False
        self.dispatch()

    def resume(self) -> None:
        """Killed after a checkpoint: what was under way is asked for again, what is in the log is not."""
        state = json.loads(json.dumps(self.buffer.state_dict()))
        before = self.buffer.want()
        self.buffer = self.fresh()
        self.buffer.load_state_dict(state, self.requests, self.done)
        assert self.buffer.want() == before
        logged = {scored.episode.id: scored for scored in self.inbox}
        self.running, self.inbox = [], deque()
        for request, samples in self.buffer.unfinished():
            for sample in samples:
                found = logged.get(request.episode_id(sample))
                if found is None:
                    self.running.append(Answer(request, sample, [self.version]))
                else:
                    self.inbox.append(found)
        self.dispatch()

    def possible(self, pick: int, alike: bool) -> list[Callable[[], None]]:
        """What can happen now. The engines can always stand still, so none of it may depend on another."""
        events: list[Callable[[], None]] = []
        if self.running:
            events += [lambda: self.draw(pick // 5), lambda: self.finish(pick // 5, alike)]
        if self.training:
            events.append(self.end)
        elif self.buffer.ready():
            events.append(self.begin)
        elif self.inbox:
            events.append(self.take_in)
        return events


def gates() -> st.SearchStrategy[GateConfig]:
    def made(lag: int, order: Order, stale: OnStale, oversample: float) -> GateConfig:
        if lag == 0:
            return GateConfig(refill_limit=1000)
        if order is Order.DISPATCH:
            return GateConfig(max_lag=lag, order=order, on_stale=stale, refill_limit=1000)
        stale = OnStale.MASK_TOKENS if stale is OnStale.WAIT else stale
        return GateConfig(max_lag=lag, order=order, on_stale=stale, oversample=oversample, refill_limit=1000)

    sizes = st.sampled_from([1.0, 1.5, 2.0])
    return st.builds(made, st.integers(0, 9), st.sampled_from(Order), st.sampled_from(OnStale), sizes)


EVENTS = st.lists(st.tuples(st.integers(0, 5000), st.booleans(), st.integers(0, 11)), max_size=90)


@settings(max_examples=100, deadline=None)
@given(gates(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), EVENTS)
def test_nothing_older_than_the_bound_is_trained_and_training_goes_on(config, groups, updates, samples, events) -> None:
    world = World(config, groups, updates, samples)
    for pick, alike, resumes in events:
        possible = world.possible(pick, alike)
        assert possible, "deadlock: nothing runs, nothing is ready, nothing trains"
        possible[pick % len(possible)]()
        assert world.buffer.alive <= world.gate.max_alive
        if resumes == 0 and not world.training:
            world.resume()
    step = world.version.step
    for pick in range(4000):
        if world.version.step >= step + GOAL * updates:
            break
        # answers end one after the other, the last that was asked for first: the worst order for dispatch order
        possible = world.possible(5 * (len(world.running) - 1 if pick % 3 else 0), alike=False)
        assert possible, "deadlock: nothing runs, nothing is ready, nothing trains"
        possible[-1 if len(possible) != 2 else 1]()
    assert world.version.step >= step + GOAL * updates
    assert max(world.lags, default=0) <= config.max_lag


@pytest.mark.parametrize(
    ("lag", "updates", "reached"), [(0, 3, 0), (1, 2, 0), (2, 2, 2), (3, 2, 2), (4, 2, 4), (5, 3, 3), (8, 4, 8)]
)
def test_the_bound_is_used_as_far_as_whole_batches_go(lag: int, updates: int, reached: int) -> None:
    """Answers that end at once: generation runs ahead by ⌊lag / updates⌋ batches, each of which is `updates` steps."""
    order = Order.DISPATCH if lag else None
    world = World(GateConfig(max_lag=lag, order=order), 2, updates, 2)
    for _ in range(6):
        while world.running:
            world.finish(0, alike=False)
        while not world.buffer.ready():
            world.take_in()
        world.begin()
        while world.running:
            world.finish(0, alike=False)
        world.end()
    assert max(world.lags) == reached
