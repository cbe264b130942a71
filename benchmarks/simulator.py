"""A run in virtual time: engines and trainer are clocks, the buffer, gate, pacing and lineage are those of a run.

    request ─► [engines: slots, decoding steps, tools] ─► inbox ─► buffer ─► gate ─► trainer's clock
       ▲                                                                                  │
       └────────────────────── slots freed, engines go on under v+1 ◄─────────────────────┘

`_Simulation.fill` and `train_batch` follow `orchestrate.loop.Loop` line by line: episodes that finish while a batch
trains wait in the inbox and are looked at when the next batch is filled; groups keep their slots until their step is
done; tokens are judged by the version in use when their batch is taken.

What is modelled. An engine gives every running sequence one token in `step_seconds + running · sequence_seconds`; what
exceeds its slots waits, first come first served. A request goes to the engine with the least to do and its later
turns to the same. Publishing takes the trainer's time; while weights are activated engines stand still, then
unfinished sequences go on under the new version. What is not: prefill, failures, evaluation, checkpoints, a KV cache
that is full, the time of the loop itself.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sluice.config.data import GateConfig
from sluice.data.buffer import Buffer
from sluice.data.filters import equal_rewards
from sluice.data.gate import Gate
from sluice.data.strategy import GroupStrategy
from sluice.types import (
    Author,
    Episode,
    Group,
    GroupRequest,
    Message,
    Outcome,
    Prompt,
    Reward,
    SamplingParams,
    Scored,
    Segment,
    Turn,
    Version,
    VersionSpan,
    expand,
    observed,
)
from sluice.weights.lineage import Lineage

ANY = -1
"""Whichever engine has the least to do."""
NORMAL_P99 = 2.3263478740408408
"""The 99th percentile of the standard normal distribution."""
SAMPLING = SamplingParams()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sampled tokens of an episode: lognormal, or those of a real run.

    Attributes:
        median, tail: the 50th percentile, and the 99th as a multiple of it; a tail of 1 is a constant.
        limit: the longest answer; the rest is cut off.
        shared: part of the variance of log length that the members of a group have in common.
        measured: those of the groups of a real run, in dispatch order, again from the start at their end.
    """

    median: float = 1000.0
    tail: float = 8.0
    limit: int = 32_768
    shared: float = 0.5
    measured: tuple[tuple[int, ...], ...] = ()

    def draw(self, noise: np.random.Generator, n: int, ordinal: int) -> list[int]:
        """Lengths of the group of `n` that is dispatched as the `ordinal`-th."""
        if self.measured:
            return list(self.measured[ordinal % len(self.measured)])
        sigma = math.log(self.tail) / NORMAL_P99
        z = math.sqrt(self.shared) * noise.standard_normal() + math.sqrt(1 - self.shared) * noise.standard_normal(n)
        return [int(each) for each in np.clip(np.rint(self.median * np.exp(sigma * z)), 1, self.limit)]


@dataclass(frozen=True, slots=True)
class World:
    """What is simulated. All times are seconds.

    Attributes:
        slots: sequences that one engine decodes together.
        samples: episodes of a group.
        updates: optimizer steps of a batch.
        step_seconds, sequence_seconds: a decoding step takes the first, and the second for each running sequence.
        request_seconds: from the dispatch of an episode until an engine has it.
        turns, tool_seconds: an episode's tokens are divided among turns; between them a tool takes an exponential
            time of this mean, and the slot is free.
        train_seconds, token_seconds: a batch takes the first, and the second for each of its tokens.
        publish_seconds: after it, engines still running.
        sync_seconds: engines stand still.
        spread: what part of groups has rewards that differ; the others are dropped by the filter `equal_rewards`.
        batches: how many are trained. `finite`: the run ends there, so that nothing is dispatched for later ones.
        warmup: batches before figures are taken.
    """

    engines: int
    slots: int
    groups_per_step: int
    gate: GateConfig = field(default_factory=GateConfig)
    samples: int = 8
    updates: int = 1
    lengths: Lengths = field(default_factory=Lengths)
    step_seconds: float = 0.02
    sequence_seconds: float = 0.0
    request_seconds: float = 0.0
    turns: int = 1
    tool_seconds: float = 0.0
    train_seconds: float = 0.0
    token_seconds: float = 0.0
    publish_seconds: float = 0.0
    sync_seconds: float = 0.0
    spread: float = 1.0
    batches: int = 12
    warmup: int = 0
    finite: bool = False
    seed: int = 0


@dataclass(slots=True)
class _Job:
    """One episode under way."""

    request: GroupRequest
    sample: int
    turns: list[int]
    waits: list[float]
    reward: float
    dispatched: float
    done: list[Turn] = field(default_factory=list[Turn])
    began: float = 0.0
    spans: list[VersionSpan] = field(default_factory=list[VersionSpan])

    @property
    def length(self) -> int:
        """Tokens of the turn under way."""
        return self.turns[len(self.done)]


class _Engine:
    """Decodes up to `slots` sequences, all at the same pace. `progress` is the tokens each of them was given so far."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.running: list[tuple[float, int, _Job]] = []
        self.waiting: deque[_Job] = deque()
        self.progress = self.now = 0.0
        self.paused = False
        self.epoch = 0
        self._serial = 0
        self.busy = self.slot_seconds = self.sampled = 0.0

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    @property
    def pace(self) -> float:
        """Seconds of a decoding step."""
        return self._world.step_seconds + self._world.sequence_seconds * len(self.running)

    def advance(self, now: float) -> None:
        """Decode until `now`."""
        passed, self.now = now - self.now, now
        if self.paused or not self.running or passed <= 0:
            return
        tokens = passed / self.pace
        self.progress += tokens
        self.busy += passed
        self.slot_seconds += passed * len(self.running)
        self.sampled += tokens * len(self.running)

    def admit(self) -> None:
        """Fill free slots."""
        while self.waiting and len(self.running) < self._world.slots:
            job = self.waiting.popleft()
            job.began, job.spans = self.progress, []
            self._serial += 1
            heapq.heappush(self.running, (self.progress + job.length, self._serial, job))

    def next_finish(self) -> float | None:
        """When the next turn ends, if nothing else happens."""
        if self.paused or not self.running:
            return None
        return self.now + max(0.0, self.running[0][0] - self.progress) * self.pace

    def close_spans(self, version: Version) -> None:
        """Weights change: what was decoded so far is of `version`."""
        for _, _, job in self.running:
            self._close(job, version, min(job.length, math.floor(self.progress - job.began + 1e-6)))

    def finish(self, version: Version) -> _Job:
        """Take out the turn that has ended."""
        mark, _, job = heapq.heappop(self.running)
        self.progress = max(self.progress, mark)  # rounding
        self._close(job, version, job.length)
        n = job.length
        job.done.append(
            Turn(Author.SAMPLED, _zeros(n, np.int32), _zeros(n, np.float32), tuple(job.spans), SAMPLING, "stop")
        )
        return job

    @staticmethod
    def _close(job: _Job, version: Version, end: int) -> None:
        start = job.spans[-1].end if job.spans else 0
        if end > start:
            job.spans.append(VersionSpan(start, end, version))


_ZEROS: dict[Any, Any] = {}


def _zeros(n: int, dtype: Any) -> Any:
    """A view of shared zeros: of what is under way only lengths and versions matter."""
    if n > len(_ZEROS.get(dtype, ())):
        _ZEROS[dtype] = np.zeros(2 * n, dtype)
    return _ZEROS[dtype][:n]


class _Event(NamedTuple):
    at: float
    serial: int
    engine: int
    epoch: int
    job: _Job | None
    """A turn that comes to the engine; None when one of the engine's has ended."""


@dataclass(slots=True)
class Tally:
    """Sums since the start; a window is the difference of two."""

    seconds: float = 0.0
    waiting: float = 0.0
    training: float = 0.0
    syncing: float = 0.0
    engine_busy: float = 0.0
    slot_seconds: float = 0.0
    sampled: float = 0.0
    trained: int = 0
    masked: int = 0
    dropped: int = 0
    episodes: int = 0
    episodes_dropped: int = 0
    groups_filtered: int = 0
    groups_emptied: int = 0
    lags: Counter[int] = field(default_factory=Counter[int])
    judged: Counter[int] = field(default_factory=Counter[int])

    def since(self, before: Tally) -> Tally:
        """What came after `before`."""
        pairs = {name: (getattr(self, name), getattr(before, name)) for name in Tally.__slots__}
        return Tally(**{name: now - then for name, (now, then) in pairs.items()})

    def copy(self) -> Tally:
        return self.since(Tally())


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a simulated run came to.

    Attributes:
        world: what was simulated.
        window: sums after the warm-up.
        whole: sums of the whole run.
        batches: of the window.
        in_flight: tokens sampled for what is still alive at the end.
        episode_seconds: from dispatch to end, of all episodes that ended.
    """

    world: World
    window: Tally
    whole: Tally
    batches: int
    in_flight: float
    episode_seconds: float

    def figures(self) -> dict[str, Any]:
        """The window in shares and rates; what is idle is idle for want of work, not because weights are activated."""
        w, world = self.window, self.world
        standing = w.syncing * world.engines
        capacity = w.seconds * world.engines
        return {
            "seconds_per_batch": w.seconds / self.batches,
            "engine_idle": 1 - (w.engine_busy + standing) / capacity,
            "slot_idle": 1 - (w.slot_seconds + standing * world.slots) / (capacity * world.slots),
            "trainer_idle": w.waiting / w.seconds,
            "syncing": w.syncing / w.seconds,
            "trained_tokens_per_second": w.trained / w.seconds,
            "sampled_tokens_per_second": w.sampled / w.seconds,
            "tokens_trained": w.trained,
            "tokens_masked": w.masked,
            "tokens_dropped": w.dropped,
            "episodes": w.episodes,
            "episodes_dropped": w.episodes_dropped,
            "groups_filtered": w.groups_filtered,
            "groups_emptied": w.groups_emptied,
            "lag_histogram": {str(lag): w.lags[lag] for lag in sorted(w.lags)},
            "lag_max_trained": max(w.lags, default=0),
            "lag_max_seen": max(w.judged, default=0),
        }


class _Simulation:
    def __init__(self, world: World) -> None:
        self._world = world
        self._gate = Gate(world.gate, world.groups_per_step, world.updates)
        prompts = [Prompt(f"p{i}", "simulated", (Message("user", str(i)),)) for i in range(64)]
        strategy = GroupStrategy(prompts, samples=world.samples, seed=world.seed)
        filters = [equal_rewards(1e-6)] if world.spread < 1 else []
        self._buffer = Buffer(self._gate, strategy, sampling=SAMPLING, filters=filters)
        self._lineage = Lineage()
        self._version = self._lineage.name(0, None, "0")
        self._engines = [_Engine(world) for _ in range(world.engines)]
        self._idlest = [(0, i) for i in range(world.engines)]
        self._events: list[_Event] = []
        self._serial = 0
        self._now = 0.0
        self._inbox: deque[Scored] = deque()
        self._missing: dict[str, int] = {}
        self._tokens_in: dict[str, int] = {}
        self._tally = Tally()
        self._batch = 0
        self._episode_seconds = 0.0

    def run(self) -> Outlook:
        before = Tally()
        for batch in range(self._world.batches):
            if batch == self._world.warmup:
                before = self._sums().copy()
            self._train(self._fill())
        whole = self._sums().copy()
        in_flight = sum(engine.progress - job.began for engine in self._engines for _, _, job in engine.running)
        in_flight += sum(len(turn) for job in self._under_way() for turn in job.done)
        in_flight += sum(m.episode.num_sampled_tokens for m in self._inbox) + sum(self._tokens_in.values())
        batches = self._world.batches - self._world.warmup
        return Outlook(self._world, whole.since(before), whole, batches, in_flight, self._episode_seconds)

    def _sums(self) -> Tally:
        for engine in self._engines:
            engine.advance(self._now)
        self._tally.seconds = self._now
        self._tally.engine_busy = sum(engine.busy for engine in self._engines)
        self._tally.slot_seconds = sum(engine.slot_seconds for engine in self._engines)
        self._tally.sampled = sum(engine.sampled for engine in self._engines)
        return self._tally

    def _under_way(self) -> list[_Job]:
        jobs = [job for engine in self._engines for _, _, job in engine.running]
        jobs += [job for engine in self._engines for job in engine.waiting]
        return jobs + [event.job for event in self._events if event.job is not None]

    # ── the loop ────────────────────────────────────────────────────────────────────────────────────────

    def _fill(self) -> list[Group]:
        """As `Loop._fill`: the next batch."""
        began = self._now
        self._dispatch()
        ready = self._buffer.ready()
        while not ready:
            while not self._inbox:
                self._step()
            scored = self._inbox.popleft()
            group = scored.episode.group_id
            self._tokens_in[group] = self._tokens_in.get(group, 0) + scored.episode.num_sampled_tokens
            for drop in self._buffer.add(scored):
                self._tally.groups_filtered += 1
                self._tally.dropped += self._tokens_in.pop(drop.group.id)
            self._missing[group] -= 1
            if not self._missing[group]:  # else nothing can have become ready
                del self._missing[group]
                ready = self._buffer.ready()
            self._dispatch()
        groups = self._buffer.take()
        self._dispatch()
        self._tally.waiting += self._now - began
        return groups

    def _dispatch(self) -> None:
        """As `Loop._dispatch`; a run without an end is never short of batches to dispatch for."""
        world, buffer = self._world, self._buffer
        count = buffer.want()
        if world.finite:
            count = min(count, (world.batches - self._batch) * world.groups_per_step - buffer.alive)
        for _ in range(count):
            request = buffer.request()
            self._missing[request.id] = request.n
            for job in self._jobs(request):
                self._push(self._now + self._world.request_seconds, ANY, 0, job)

    def _jobs(self, request: GroupRequest) -> list[_Job]:
        """The episodes of a group. What is drawn depends on the seed and the group's place alone."""
        world = self._world
        noise = np.random.default_rng((world.seed, request.ordinal))
        lengths = world.lengths.draw(noise, request.n, request.ordinal)
        differ = noise.random() < world.spread
        jobs: list[_Job] = []
        for sample, length in enumerate(lengths):
            count = min(world.turns, length)
            turns = [length * (i + 1) // count - length * i // count for i in range(count)]
            waits = [float(each) for each in noise.exponential(world.tool_seconds, count - 1)]
            jobs.append(_Job(request, sample, turns, waits, float(differ and sample % 2), self._now))
        return jobs

    def _train(self, groups: list[Group]) -> None:
        """As `Loop._train`: judge at the version in use, step, publish, activate, free the slots."""
        world, tally = self._world, self._tally
        tokens = 0
        for group in groups:
            tokens += self._tokens_in.pop(group.id)
            kept = [self._judge(member) for member in group.members]
            tally.groups_emptied += not any(kept)
        seconds = world.train_seconds + world.token_seconds * tokens
        tally.training += seconds + world.publish_seconds
        self._until(self._now + seconds + world.publish_seconds)
        for i, engine in enumerate(self._engines):
            engine.advance(self._now)
            engine.close_spans(self._version)
            engine.paused = True
            self._schedule(i)
        self._version = self._lineage.name(self._version.step + world.updates, self._version, "0")
        tally.syncing += world.sync_seconds
        self._until(self._now + world.sync_seconds)
        for i, engine in enumerate(self._engines):
            engine.advance(self._now)
            engine.paused = False
            self._schedule(i)
        self._buffer.trained()
        self._batch += 1

    def _judge(self, member: Scored) -> int:
        """The gate's word on one episode. Returns its tokens that are trained."""
        tally = self._tally
        verdict = self._gate.judge(expand(member.episode), self._lineage.lag)
        tally.episodes += 1
        tally.judged[verdict.lag] += 1
        lags = [sample["lag"][sample.trained] for sample in verdict.samples]
        counts = np.bincount(np.concatenate(lags))
        for lag in np.flatnonzero(counts):
            tally.lags[int(lag)] += int(counts[lag])
        trained = int(counts.sum())
        tally.trained += trained
        if verdict.dropped:
            tally.dropped += verdict.masked_tokens
            tally.episodes_dropped += 1
        else:
            tally.masked += verdict.masked_tokens
        return trained

    # ── the clock ───────────────────────────────────────────────────────────────────────────────────────

    def _until(self, then: float) -> None:
        """Let engines and tools go on until `then`."""
        while self._events and self._events[0].at <= then:
            self._step()
        self._now = then

    def _step(self) -> None:
        """The next event."""
        event = heapq.heappop(self._events)
        if event.job is not None:
            self._now = event.at
            self._place(event.job, event.engine)
            return
        engine = self._engines[event.engine]
        if event.epoch == engine.epoch:
            self._now = event.at
            engine.advance(self._now)
            self._ended(engine.finish(self._version), event.engine)
            engine.admit()
            self._schedule(event.engine)

    def _ended(self, job: _Job, engine: int) -> None:
        """A turn has ended: a tool is called, or the episode is complete."""
        if len(job.done) < len(job.turns):
            self._push(self._now + job.waits[len(job.done) - 1], engine, 0, job)
            return
        self._episode_seconds += self._now - job.dispatched
        turns = [each for turn in job.done for each in (observed([0]), turn)]
        id = job.request.episode_id(job.sample)
        episode = Episode(id, job.request.id, job.request.prompt, (Segment(tuple(turns)),), Outcome.COMPLETED)
        self._inbox.append(Scored(episode, Reward({"r": job.reward}, {"r": 1.0})))

    def _place(self, job: _Job, engine: int) -> None:
        """A turn has come to an engine."""
        if engine == ANY:
            engine = self._least_loaded()
        chosen = self._engines[engine]
        chosen.advance(self._now)
        chosen.waiting.append(job)
        chosen.admit()
        self._schedule(engine)

    def _least_loaded(self) -> int:
        while True:  # an entry that is out of date was followed by a newer one
            load, engine = self._idlest[0]
            if load == self._engines[engine].load:
                return engine
            heapq.heappop(self._idlest)

    def _schedule(self, index: int) -> None:
        """Foresee the engine's next end of a turn; what was foreseen before is void."""
        engine = self._engines[index]
        engine.epoch += 1
        heapq.heappush(self._idlest, (engine.load, index))
        at = engine.next_finish()
        if at is not None:
            self._push(at, index, engine.epoch, None)

    def _push(self, at: float, engine: int, epoch: int, job: _Job | None) -> None:
        self._serial += 1
        heapq.heappush(self._events, _Event(at, self._serial, engine, epoch, job))


def simulate(world: World) -> Outlook:
    """Run a world to its last batch."""
    return _Simulation(world).run()
