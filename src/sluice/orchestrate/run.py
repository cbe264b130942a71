"""A run: its parts are built, brought to where a checkpoint stood, and handed to the loop."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice import __version__, device
from sluice.algos import make_algorithm
from sluice.algos.base import Algorithm
from sluice.checkpoint.store import Checkpoint, CheckpointStore
from sluice.config.data import OnStale
from sluice.config.run import RunConfig
from sluice.data.buffer import Buffer
from sluice.data.filters import GroupFilter
from sluice.data.gate import Gate
from sluice.data.strategy import Strategy
from sluice.errors import LogError
from sluice.log.records import Disposition, DispositionRecord, FaultRecord, ResumeRecord, RunRecord
from sluice.log.writer import LogWriter
from sluice.obs.metrics import MetricSink
from sluice.obs.sinks import open_sinks
from sluice.obs.summary import Summary
from sluice.obs.timing import PhaseTimer
from sluice.obs.view import View
from sluice.orchestrate.beside import Beside
from sluice.orchestrate.evaluation import EvalResult, Evaluator
from sluice.orchestrate.folder import digest
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.learner import Learner
from sluice.orchestrate.ledger import ledger
from sluice.orchestrate.loop import Loop, Parts
from sluice.orchestrate.placement import Placement
from sluice.orchestrate.pool import Pool
from sluice.orchestrate.producer import Found, Producer
from sluice.orchestrate.progress import Progress
from sluice.orchestrate.recovery import alive_episodes, alive_requests, first_alive, logged_episodes, logged_versions
from sluice.orchestrate.refusal import refusal, too_old
from sluice.orchestrate.saver import Saver
from sluice.orchestrate.setup import Data, initial_model, load_data, make_critic, total_updates
from sluice.orchestrate.streams import frozen_policies
from sluice.orchestrate.warm_start import fine_tune, prefer
from sluice.train.backends.torch import TorchTrainer
from sluice.train.base import Critic, Trainer
from sluice.types import SamplingParams, Scored, Version
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore


@dataclass(frozen=True, slots=True)
class Supply:
    """Where a run's episodes come from, and whom its weights go to.

    Attributes:
        gate, strategy, sampling, filters: of the buffer.
        pool: whose the devices are.
        produce: makes the producer, given what the log of an earlier try holds beyond its checkpoint.
        evaluator: None where nothing is held out, or nothing can be asked.
        elsewhere: turns are computed by other processes.
        figures: of the engine, for the metrics of a batch.
        tasks: names of those that may be trained.
    """

    gate: Gate
    strategy: Strategy
    sampling: SamplingParams
    filters: Sequence[GroupFilter]
    pool: Pool
    produce: Callable[[Found], Producer]
    evaluator: Evaluator | None
    elsewhere: bool
    figures: Callable[[], Mapping[str, float]]
    tasks: Set[str]


class Run(ABC):
    """Builds the parts, brings them to where a checkpoint stood, runs the loop, writes the summary."""

    def __init__(self, config: RunConfig, folder: Path, view: View, *, resume: bool, placement: Placement) -> None:
        self._config = config
        self._folder = folder
        self._view = view
        self._resume = resume
        self._device = device.resolve(config.device)
        self._timer = PhaseTimer()
        self._trainers, self._hosts, self._measuring = placement.trainers, placement.hosts, placement.measuring

    @abstractmethod
    def _check(self, stack: AsyncExitStack, data: Data) -> None:
        """Refuse, before anything is written, what does not go together."""

    @abstractmethod
    def _facts(self, data: Data) -> dict[str, str]:
        """What the view shows beside the run's name."""

    @abstractmethod
    async def _supply(
        self, stack: AsyncExitStack, start: Path, data: Data, journal: Journal, algorithm: Algorithm, lineage: Lineage
    ) -> Supply:
        """What generates, started; `start` is the folder of the first weights. Closed with the stack."""

    def _make_trainer(
        self, stack: AsyncExitStack, start: Path, algorithm: Algorithm, frozen: Mapping[str, Path]
    ) -> tuple[Trainer, Critic | None]:
        """Trainer of the policy, and critic, from the first weights. Closed with the stack."""
        config = self._config
        opened = self._trainers.open(
            "policy", config.train, start, total_steps=total_updates(config, algorithm), seed=config.seed,
            frozen=frozen,
        )  # fmt: skip
        trainer = stack.enter_context(opened)
        return trainer, make_critic(config, algorithm, start, trainer, device=self._device)

    def _make_loop(self, parts: Parts, progress: Progress) -> Loop:
        return Loop(self._config, parts, progress)

    async def run(self) -> Summary:
        """The whole run. Everything that was opened is closed again, whatever happens."""
        config, folder = self._config, self._folder
        checkpoints = CheckpointStore(folder / "checkpoints", keep=config.checkpoint.keep)
        async with AsyncExitStack() as stack:
            durability = "power" if config.log.power_safe else "process"
            writer = LogWriter(folder / "log", rotate_bytes=config.log.rotate_bytes, durability=durability)
            journal = Journal(stack.enter_context(writer))
            checkpoint = checkpoints.latest() if self._resume else None
            data = load_data(config.data, seed=config.seed)
            self._check(stack, data)
            journal.write_now(RunRecord(digest(config), config.seed, __version__))
            self._view.start(config.name, config.steps, str(folder), self._facts(data))
            stack.callback(self._view.close)

            algorithm = make_algorithm(config.algorithm, max_new_tokens=config.rollout.sampling.max_new_tokens)
            frozen = frozen_policies(algorithm, config.teachers, initial_model(config, folder))
            self._count_memory(algorithm)
            start = self._start_model(checkpoint, data)
            lineage = Lineage(logged_versions(folder / "log") if self._resume else ())
            supply = await self._supply(stack, start, data, journal, algorithm, lineage)
            trainer, critic = self._make_trainer(stack, start, algorithm, frozen)
            buffer = Buffer(supply.gate, supply.strategy, sampling=supply.sampling, filters=supply.filters)
            progress, found = self._restore(checkpoint, buffer, lineage, trainer, critic, journal)
            producer = supply.produce(found)
            stack.push_async_callback(producer.close)
            apart = supply.elsewhere or not isinstance(trainer, TorchTrainer)
            beside = Beside(apart=apart, threads=config.threads)
            stack.callback(beside.close)
            saver = Saver(checkpoints, journal, background=config.checkpoint.background, apart=apart)
            stack.callback(saver.close)
            await supply.pool.occupied(trainer, critic, beside)
            parts = Parts(
                pool=supply.pool, producer=producer, evaluator=supply.evaluator, trainer=trainer, critic=critic,
                algorithm=algorithm,
                learner=Learner(trainer, algorithm, critic, micro_batch_tokens=config.train.micro_batch_tokens),
                buffer=buffer, gate=supply.gate, lineage=lineage, store=WeightStore(folder / "weights", start, lineage),
                saver=saver, journal=journal, sinks=self._sinks(stack, progress.rows), view=self._view,
                timer=self._timer, beside=beside, figures=supply.figures, tasks=supply.tasks,
            )  # fmt: skip
            loop = self._make_loop(parts, progress)
            stack.push_async_callback(loop.measuring.close)
            return await self._drive(loop, parts, fresh=checkpoint is None)

    async def _drive(self, loop: Loop, parts: Parts, *, fresh: bool) -> Summary:
        """Run, and leave the first failure in the log with where it happened, its traceback included."""
        try:
            return await self._measure_and_train(loop, parts, fresh=fresh)
        except Exception as error:
            where = f"inline, batch {loop.progress.batch + 1}, version {parts.lineage.current}"
            record = FaultRecord(f"{type(error).__name__}: {error}", where, traceback.format_exc())
            with suppress(LogError):  # the log may be what failed; the error itself is raised either way
                parts.journal.write_now(record)
            raise

    async def _measure_and_train(self, loop: Loop, parts: Parts, *, fresh: bool) -> Summary:
        """Activate the first weights, measure them, run the loop, measure again."""
        await loop.publish()
        if not fresh:
            self._renew(parts, loop.progress.step)
        if parts.evaluator and (fresh or loop.progress.held is not None):
            await loop.evaluate(wait=False)
        if fresh:
            await loop.checkpoint()
        await loop.run()
        before = EvalResult.from_json(loop.progress.before) if loop.progress.before else None
        if parts.evaluator and loop.progress.batch not in loop.measuring.results and (self._config.steps or not before):
            await loop.evaluate(wait=True)
        after = loop.measuring.results.get(loop.progress.batch, before)
        summary = self._summary(loop, before, after)
        summary.write(self._folder / "summary.json")
        if before and after:
            self._view.compare(before.answers, after.answers)
        self._view.finish(summary)
        return summary

    def _count_memory(self, algorithm: Algorithm) -> None:
        """Refuse what cannot fit, before it is loaded. Shown where memory is somebody's concern."""
        counted = ledger(self._config, algorithm, initial_model(self._config, self._folder), self._device)
        counted.refuse_if_too_much()
        if self._config.placement.colocate or self._device != "cpu":
            for line in counted.lines():
                self._view.log(line)

    def _start_model(self, checkpoint: Checkpoint | None, data: Data) -> Path:
        """The model of step 0: the initial one, or what the phases before RL made of it. It is also the reference."""
        config, start = self._config, initial_model(self._config, self._folder)
        options: dict[str, Any] = {
            "seed": config.seed,
            "trainers": self._trainers,
            "template_kwargs": config.model.chat_template_kwargs,
            "view": self._view,
        }
        if config.warm_start is not None:
            out = self._folder / "model-sft"
            if checkpoint is None:
                with self._timer.phase("sft"):
                    fine_tune(config.warm_start, start, out, prompts=data.train, **options)
            start = out
        if config.preferences is not None:
            out = self._folder / "model-dpo"
            if checkpoint is None:
                with self._timer.phase("dpo"):
                    prefer(config.preferences, start, out, **options)
            start = out
        return start

    def _restore(
        self,
        checkpoint: Checkpoint | None,
        buffer: Buffer,
        lineage: Lineage,
        trainer: Trainer,
        critic: Critic | None,
        journal: Journal,
    ) -> tuple[Progress, Found]:
        """Bring everything to where the checkpoint stood; find what the log holds beyond it."""
        if not self._resume:
            return Progress(), Found()
        log = self._folder / "log"
        if checkpoint is None:  # killed before the first checkpoint: begin again, keep finished episodes
            journal.write_now(ResumeRecord(0, 0))
            return Progress(), Found(logged_episodes(log, 0))
        state = checkpoint.state()
        progress = Progress(**state["progress"])
        lineage.load_state_dict(state["lineage"])
        lineage.rewind(Version.parse(state["version"]))
        alive = state["buffer"]
        found = Found(logged_episodes(log, first_alive(alive)), first_alive(alive))
        buffer.load_state_dict(alive, alive_requests(log, alive), alive_episodes(alive, found.episodes))
        trainer.load_state(checkpoint.model, checkpoint.trainer)
        if critic is not None:
            critic.load_state(checkpoint.critic)
        self._timer.load_state_dict(state["timer"])
        journal.write_now(ResumeRecord(progress.step, int(state["cursor"])))
        return progress, found

    def _renew(self, parts: Parts, step: int) -> None:
        """A run that goes on under a tighter bound leaves what cannot keep it, and asks for these prompts again."""
        gate, refused = parts.gate, refusal(parts.gate, parts.lineage)
        if gate.config.effective_on_stale is not OnStale.WAIT:
            return

        def old(scored: Scored) -> bool:
            turns = scored.episode.sampled_turns()
            return any(refused(span.version, step) for turn in turns for span in turn.spans)

        left = parts.buffer.renew(old)
        reason = too_old(gate.config.max_lag)
        if left:
            parts.journal.write_now(*(
                DispositionRecord(each.episode.id, each.episode.group_id, Disposition.DROPPED, reason=reason)
                for each in left
            ))  # fmt: skip

    def _sinks(self, stack: AsyncExitStack, rows: int) -> list[MetricSink]:
        config = self._config
        sinks, close = open_sinks(
            config.obs, self._folder, name=config.name, settings=config.model_dump(mode="json"), resume=self._resume,
            tell=self._view.log,
        )  # fmt: skip
        stack.callback(close)
        for sink in sinks if self._resume else ():
            sink.truncate_after(rows)
        return sinks

    def _summary(self, loop: Loop, before: EvalResult | None, after: EvalResult | None) -> Summary:
        progress, timer = loop.progress, self._timer
        return Summary(
            eval_before=before.accuracy if before else None,
            eval_after=after.accuracy if after else None,
            greedy_before=before.greedy if before else None,
            greedy_after=after.greedy if after else None,
            steps=progress.batch,
            wall_seconds=timer.wall_seconds,
            rollout_tokens_per_second=progress.rollout_tokens / max(progress.rollout_seconds, 1e-9),
            train_tokens_per_second=progress.trained_tokens / max(progress.train_seconds, 1e-9),
            time_split=timer.split(),
            logprob_mismatch_mean_abs=progress.mismatch_sum / max(progress.mismatch_steps, 1),
            seed=self._config.seed,
        )
