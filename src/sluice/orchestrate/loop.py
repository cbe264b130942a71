"""The loop: one for every placement and every lag.

    request ─► [producer: sample → log → reward] ─► buffer ─► score → credit → step ─► publish → activate
       ▲                                                                                     │
       └───────────────────────────── slots freed, engine serves v+1 ◄──────────────────────┘

`_fill` waits for episodes and is unblocked by the producer; the producer waits for engine, verifiers and
log. The gate decides how many groups are alive, so at lag 0 nothing is sampled while a batch trains, and
at lag > 0 the next groups are already under way when weights change: their turns go on under the new
version after a recompute. With the engine in this process the trainer's step blocks the event loop: lag is
an ordering there. With engines in processes of their own the two go on side by side, see `Beside`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sluice.algos.base import Algorithm
from sluice.config.run import RunConfig
from sluice.data.buffer import Buffer, Dropped
from sluice.data.gate import Gate, Judgement
from sluice.data.padding import pad
from sluice.log.records import CheckpointRecord, Disposition, DispositionRecord, GroupRecord, VersionRecord
from sluice.obs.metrics import MetricSink
from sluice.obs.timing import PhaseTimer
from sluice.obs.view import View
from sluice.orchestrate.batch_metrics import (
    gate_metrics,
    padding_metrics,
    rollout_metrics,
    task_metrics,
    train_metrics,
)
from sluice.orchestrate.beside import Beside
from sluice.orchestrate.evaluation import Evaluator
from sluice.orchestrate.fates import disposition, excluded, with_advantages
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.learner import Learner
from sluice.orchestrate.limits import check_infrastructure, check_mismatch
from sluice.orchestrate.measuring import Measuring
from sluice.orchestrate.pool import Pool
from sluice.orchestrate.producer import Producer
from sluice.orchestrate.progress import Progress
from sluice.orchestrate.saver import Saver, snapshots
from sluice.train.base import Critic, StepStats, Trainer
from sluice.types import Group, GroupRequest, Scored, Version
from sluice.weights.base import Published
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop drives. Built by `orchestrate.setup`; any placement gives the same parts."""

    pool: Pool
    producer: Producer
    evaluator: Evaluator | None
    trainer: Trainer
    critic: Critic | None
    learner: Learner
    algorithm: Algorithm
    buffer: Buffer
    gate: Gate
    lineage: Lineage
    store: WeightStore
    saver: Saver
    journal: Journal
    sinks: Sequence[MetricSink]
    view: View
    timer: PhaseTimer
    beside: Beside
    figures: Callable[[], Mapping[str, float]]
    tasks: Set[str]


class Loop:
    """Runs batches until the configured number is trained and the last checkpoint is there."""

    def __init__(self, config: RunConfig, parts: Parts, progress: Progress) -> None:
        self._config = config
        self._parts = parts
        self.progress = progress
        self._dropped: list[Dropped] = []
        self.measuring = Measuring(parts.evaluator, progress, parts.view, parts.sinks)
        self._published: Published | None = None

    async def run(self) -> None:
        """Train `config.steps` batches, evaluating and checkpointing on the way."""
        parts, config = self._parts, self._config
        for request, samples in parts.buffer.unfinished():
            parts.producer.start(request, samples, due=self._due(request))
        while self.progress.batch < config.steps:
            with self._phase("rollout"):
                groups = await self._fill()
            metrics = await self._train(groups)
            every = config.evaluation.every
            last = self.progress.batch == config.steps
            if parts.evaluator and (last or (every and self.progress.batch % every == 0)):
                await self.evaluate(wait=last)
            self._emit(metrics)
            period = config.checkpoint.every
            if last or (period and self.progress.batch % period == 0):
                await self.checkpoint()
            await parts.saver.look()
        await self._measured()
        with self._phase("checkpoint"):
            await parts.saver.settle()

    async def publish(self, *records: DispositionRecord) -> Version:
        """Name the trainer's weights, log them behind what else belongs to the step, and activate them."""
        parts = self._parts
        with self._phase("publish"):
            await parts.pool.rest()
            published = await parts.beside(parts.store.publish, parts.trainer, self.progress.step)
            born = published.manifest
            await parts.journal.write(*records, VersionRecord(born.version, born.parent, born.checksum))
        await self._released()
        with self._phase("publish"):
            await parts.pool.serve(published)
        self._published = published
        return born.version

    async def evaluate(self, *, wait: bool) -> None:
        """Begin to measure the weights in use on the held-out prompts. The evaluation before has ended then.

        Args:
            wait: return when it has ended; always so unless `evaluation.beside`.
        """
        await self._measured()
        assert self._published is not None  # `publish` comes first
        self.measuring.begin(self._published)
        if wait or not self._config.evaluation.beside:
            await self._measured()

    async def _measured(self) -> None:
        """Returns when no evaluation is under way. Raises what one failed with."""
        if self.measuring.under_way:
            with self._phase("evaluate"):
                await self.measuring.settle()

    async def _released(self) -> None:
        """Returns when no evaluation reads the engine's weights: they may change."""
        if not self.measuring.apart:
            await self._measured()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Account the time of a phase and show it."""
        self._parts.view.phase(name)
        with self._parts.timer.phase(name):
            yield

    # ── one batch ───────────────────────────────────────────────────────────────────────────────────────

    async def _fill(self) -> list[Group]:
        """Keep the gate's number of groups alive until a batch is settled; take it."""
        parts = self._parts
        self._dropped = []
        self._dispatch()
        while not parts.buffer.ready():
            scored = await self.measuring.unless_failed(parts.producer.next())
            dropped = parts.buffer.add(scored)
            if dropped:
                await self._record_drops(dropped)
            self._dispatch()
        groups = parts.buffer.take()
        self._dispatch()
        return groups

    def _dispatch(self) -> None:
        """Ask for as many groups as the gate admits and the batches that are left can train."""
        buffer = self._parts.buffer
        left = (self._config.steps - self.progress.batch) * self._config.groups_per_step - buffer.alive
        requests: list[tuple[GroupRequest, int]] = []
        for _ in range(min(buffer.want(), left)):
            request = buffer.request()
            requests.append((request, self._due(request)))
        if requests:
            self._parts.journal.write_now(*(GroupRecord(request) for request, _ in requests))
        for request, due in requests:
            self._parts.producer.start(request, range(request.n), due=due)

    def _due(self, request: GroupRequest) -> int:
        """Step of the weights in use when the group's batch is taken, at most. In dispatch order."""
        return self.progress.step + self._parts.buffer.batches_before(request) * self._parts.gate.updates

    async def _record_drops(self, dropped: Sequence[Dropped]) -> None:
        self._dropped += dropped
        records = [
            DispositionRecord(member.episode.id, drop.group.id, Disposition.DROPPED, reason=f"filter: {drop.reason}")
            for drop in dropped
            for member in drop.group.members
        ]
        await self._parts.journal.write(*records)

    async def _train(self, groups: list[Group]) -> dict[str, float]:
        parts, progress = self._parts, self.progress
        check_infrastructure(groups, self._config.limits)
        step = progress.step + parts.algorithm.updates_per_batch
        judged, dispositions, verdicts = self._judge(groups, step)
        several = len(parts.tasks) > 1
        padding: dict[str, float] = {}
        if self._config.data.padding is not None:
            judged, whole = [pad(group) for group in judged], judged
            padding = padding_metrics(whole, judged, by_task=several)
        if self._config.placement.colocate:
            await self._released()  # the engine is about to be drained
        await parts.pool.train()
        with self._phase("score"):
            scored = await parts.beside(parts.learner.score, judged)
        with self._phase("train"):
            updates = parts.learner.credit(scored)
            stats, critic_metrics = await parts.beside(parts.learner.update, updates, progress.batch)
        progress.step += len(stats)
        version = await self.publish(*with_advantages(dispositions, updates))
        parts.buffer.trained()
        progress.batch += 1
        metrics = (
            rollout_metrics(groups, self._dropped) | gate_metrics(verdicts) | train_metrics(stats) | critic_metrics
        ) | padding
        if several:
            metrics |= task_metrics(groups, self._dropped, verdicts)
        metrics["version/step"], metrics["version/attempt"] = version
        self._count(groups, stats)
        check_mismatch(metrics, self._config.limits)
        return metrics

    def _judge(
        self, groups: list[Group], step: int
    ) -> tuple[list[Group], list[DispositionRecord], list[tuple[str, Judgement]]]:
        """The gate's word on every episode of the batch that `step` trains, at the version now in use."""
        parts = self._parts
        judged: list[Group] = []
        dispositions: list[DispositionRecord] = []
        verdicts: list[tuple[str, Judgement]] = []
        for group in groups:
            members: list[Scored] = []
            for member in group.members:
                episode = member.episode
                if not episode.outcome.counts:
                    dispositions.append(excluded(episode, step))
                    members.append(member)
                    continue
                verdict = parts.gate.judge(member.samples, parts.lineage.lag)
                verdicts.append((group.request.prompt.task, verdict))
                members.append(replace(member, samples=verdict.samples))
                dispositions.append(disposition(member, verdict, step))
            judged.append(replace(group, members=tuple(members)))
        return judged, dispositions, verdicts

    # ── limits, metrics, checkpoint ─────────────────────────────────────────────────────────────────────

    def _in_use(self) -> Version:
        version = self._parts.lineage.current
        assert version is not None  # activated before the loop starts
        return version

    def _count(self, groups: list[Group], stats: list[StepStats]) -> None:
        progress, timer = self.progress, self._parts.timer
        progress.rollout_tokens += sum(m.episode.num_sampled_tokens for g in groups for m in g.members)
        progress.rollout_tokens += sum(
            m.episode.num_sampled_tokens for drop in self._dropped for m in drop.group.members
        )
        progress.trained_tokens += sum(stat.num_tokens for stat in stats)
        progress.rollout_seconds = timer.seconds("rollout")
        progress.train_seconds = timer.seconds("train") + timer.seconds("score")
        if stats and stats[0].mismatch is not None:
            progress.mismatch_sum += stats[0].mismatch.mean_abs
            progress.mismatch_steps += 1

    def _emit(self, metrics: dict[str, float]) -> None:
        parts, progress = self._parts, self.progress
        seconds = max(progress.rollout_seconds, 1e-9), max(progress.train_seconds, 1e-9)
        metrics["speed/rollout_tokens_per_second"] = progress.rollout_tokens / seconds[0]
        metrics["speed/train_tokens_per_second"] = progress.trained_tokens / seconds[1]
        metrics |= {f"time/{name}": value for name, value in parts.timer.lap().items()}
        metrics |= {**parts.figures(), **parts.pool.figures(), **parts.saver.figures()}
        parts.view.step(progress.batch, metrics)
        self.measuring.row(progress.batch, metrics)

    async def checkpoint(self) -> None:
        """Begin to write everything that a resumed run needs, as it is now; what was begun before is finished first."""
        parts, progress = self._parts, self.progress
        if self.measuring.batch < progress.batch:  # a run resumed from here could not measure those weights again
            await self._measured()
        with self._phase("checkpoint"):
            await parts.saver.settle()
            write = await parts.beside(snapshots, parts.trainer, parts.critic, copy=parts.saver.background)
            progress.wall_seconds = parts.timer.wall_seconds
            state = {
                "progress": {name: getattr(progress, name) for name in Progress.__slots__},
                "version": str(self._in_use()),
                "lineage": parts.lineage.state_dict(),
                "buffer": parts.buffer.state_dict(),
                "timer": parts.timer.state_dict(),
                "cursor": parts.journal.sync(),
            }
            await parts.saver.begin(progress.batch, state, write, CheckpointRecord(progress.step, self._in_use()))
