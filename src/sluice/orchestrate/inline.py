"""A run in one process: trainer, runners and gateway here; the engine too, or SGLang servers beside it."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from sluice import __version__, device
from sluice.algos import make_algorithm
from sluice.algos.base import Algorithm
from sluice.checkpoint.store import Checkpoint, CheckpointStore
from sluice.config.data import OnStale
from sluice.config.run import RunConfig
from sluice.data.buffer import Buffer
from sluice.data.filters import make_filter
from sluice.data.gate import Gate
from sluice.errors import ConfigError, LogError
from sluice.log.records import Disposition, DispositionRecord, FaultRecord, ResumeRecord, RunRecord
from sluice.log.writer import LogWriter
from sluice.models.build import load_tokenizer
from sluice.models.chat_template import load_templated
from sluice.obs.metrics import MetricSink
from sluice.obs.sinks import open_sinks
from sluice.obs.summary import Summary
from sluice.obs.timing import PhaseTimer
from sluice.obs.view import View
from sluice.orchestrate.assignment import assign
from sluice.orchestrate.beside import Beside
from sluice.orchestrate.evaluation import EvalResult, Evaluator
from sluice.orchestrate.folder import digest
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.learner import Learner
from sluice.orchestrate.ledger import ledger
from sluice.orchestrate.loop import Loop, Parts, Progress
from sluice.orchestrate.placement import Placement
from sluice.orchestrate.pool import Apart, Shared
from sluice.orchestrate.producer import Producer, Recovered
from sluice.orchestrate.recovery import alive_episodes, alive_requests, first_alive, logged_episodes, logged_versions
from sluice.orchestrate.serving import Rollout, open_rollout
from sluice.orchestrate.setup import (
    Data,
    check_prompts,
    embedded_engine,
    initial_model,
    load_data,
    make_critic,
    make_engine,
    make_strategy,
    require,
    total_updates,
)
from sluice.orchestrate.streams import frozen_policies
from sluice.orchestrate.warm_start import fine_tune, prefer
from sluice.rewards.means import Means
from sluice.rewards.rubric import Rubric
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.rollout.engines.sglang import SGLangFleet
from sluice.sandbox.sandbox import Sandbox
from sluice.train.backends.torch import TorchTrainer
from sluice.train.base import Critic, Trainer
from sluice.types import Scored, Version
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore


class InlineRun:
    """Builds the parts, brings them to where a checkpoint stood, runs the loop, writes the summary."""

    def __init__(self, config: RunConfig, folder: Path, view: View, *, resume: bool, placement: Placement) -> None:
        self._config = config
        self._folder = folder
        self._view = view
        self._resume = resume
        self._device = device.resolve(config.device)
        self._timer = PhaseTimer()
        self._trainers, self._hosts = placement.trainers, placement.hosts

    async def run(self) -> Summary:
        """The whole run. Everything that was opened is closed again, whatever happens."""
        config, folder = self._config, self._folder
        checkpoints = CheckpointStore(folder / "checkpoints", keep=config.checkpoint.keep)
        async with AsyncExitStack() as stack:
            writer = stack.enter_context(
                LogWriter(
                    folder / "log",
                    rotate_bytes=config.log.rotate_bytes,
                    durability="power" if config.log.power_safe else "process",
                )
            )
            journal = Journal(writer)
            checkpoint = checkpoints.latest() if self._resume else None
            data = load_data(config.data, seed=config.seed)
            rubric = Rubric(config.rewards, Means(Sandbox))
            stack.push_async_callback(rubric.close)
            rubric.check(data.tasks, complete=True)
            rubric.check_prompts(data.trained)
            journal.write_now(RunRecord(digest(config), config.seed, __version__))
            self._view.start(config.name, config.steps, str(folder), facts(config, data, self._device))
            stack.callback(self._view.close)

            algorithm = make_algorithm(config.algorithm, max_new_tokens=config.rollout.sampling.max_new_tokens)
            frozen = frozen_policies(algorithm, config.teachers, initial_model(config, folder))
            self._count_memory(algorithm)
            start = self._start_model(checkpoint, data)
            tokenizer = load_tokenizer(start)
            engine, sink = make_engine(
                assign(config, self._device) if config.placement.runtime == "inline" else config.rollout,
                start,
                tokenizer,
                device=self._device,
                folder=folder,
                tell=self._view.log,
                hosts=self._hosts,
                shares=config.placement.colocate,
            )
            rollout = await open_rollout(
                stack, config.rollout, engine, tokenizer, folder=folder,
                template_kwargs=config.model.chat_template_kwargs, tell=self._view.log,
                beside=(*config.rewards, *(config.evaluation.rewards or ())),
            )  # fmt: skip
            check_prompts(rollout.runner, data, config.rollout.sampling.max_new_tokens)

            pool = Shared(engine, sink, self._timer, self._device) if config.placement.colocate else Apart(sink)
            if isinstance(pool, Shared):
                await pool.vacate()
            trainer = stack.enter_context(
                self._trainers.open(
                    "policy", config.train, start, total_steps=total_updates(config, algorithm), seed=config.seed,
                    frozen=frozen,
                )
            )  # fmt: skip
            critic = make_critic(config, algorithm, start, device=self._device)
            gate = Gate(config.data.gate, config.groups_per_step, algorithm.updates_per_batch)
            buffer = Buffer(
                gate,
                make_strategy(config.data, data, seed=config.seed),
                sampling=config.rollout.sampling.params(eos=rollout.chat.eos),
                filters=[make_filter(each) for each in config.data.filters],
            )
            lineage = Lineage(logged_versions(folder / "log") if self._resume else ())
            progress, recovered = self._restore(checkpoint, buffer, lineage, trainer, critic, journal)
            producer = Producer(
                rollout.runner, rubric, rollout.chat, journal, seed=config.seed, recovered=recovered,
                may_use=self._may_use(lineage, gate), stall_seconds=config.limits.stall_seconds,
            )  # fmt: skip
            stack.push_async_callback(producer.close)
            sinks = self._sinks(stack, progress.batch)
            apart = not (isinstance(engine, EmbeddedEngine) and isinstance(trainer, TorchTrainer))
            beside = Beside(apart=apart, threads=config.threads)
            stack.callback(beside.close)
            if isinstance(pool, Shared):
                await pool.occupied(trainer, critic, beside)
            parts = Parts(
                pool=pool, producer=producer,
                evaluator=make_evaluator(stack, config, rollout, journal, data) if data.held_out else None,
                trainer=trainer, critic=critic, algorithm=algorithm,
                learner=Learner(trainer, algorithm, critic, micro_batch_tokens=config.train.micro_batch_tokens),
                buffer=buffer, gate=gate, lineage=lineage,
                store=WeightStore(folder / "weights", start, lineage),
                checkpoints=checkpoints, journal=journal, sinks=sinks, view=self._view, timer=self._timer,
                beside=beside, figures=engine.figures if isinstance(engine, SGLangFleet) else dict, tasks=data.tasks,
            )  # fmt: skip
            return await self._drive(Loop(config, parts, progress), parts, fresh=checkpoint is None)

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
            self._renew(parts)
        if fresh:
            if parts.evaluator:
                loop.progress.before = (await loop.evaluate()).to_json()
            await loop.checkpoint()
        await loop.run()
        before = EvalResult.from_json(loop.progress.before) if loop.progress.before else None
        after = loop.evaluations.get(loop.progress.batch, before if self._config.steps == 0 else None)
        if after is None and parts.evaluator:
            after = await loop.evaluate()
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
    ) -> tuple[Progress, dict[str, Recovered]]:
        """Bring everything to where the checkpoint stood; find what the log holds beyond it."""
        if not self._resume:
            return Progress(), {}
        log = self._folder / "log"
        if checkpoint is None:  # killed before the first checkpoint: begin again, keep finished episodes
            journal.write_now(ResumeRecord(0, 0))
            return Progress(), logged_episodes(log, 0)
        state = checkpoint.state()
        progress = Progress(**state["progress"])
        lineage.load_state_dict(state["lineage"])
        lineage.rewind(Version.parse(state["version"]))
        recovered = logged_episodes(log, first_alive(state["buffer"]))
        alive = state["buffer"]
        buffer.load_state_dict(alive, alive_requests(log, alive), alive_episodes(alive, recovered))
        trainer.load_state(checkpoint.model, checkpoint.trainer)
        if critic is not None:
            critic.load_state(checkpoint.critic)
        self._timer.load_state_dict(state["timer"])
        journal.write_now(ResumeRecord(progress.step, int(state["cursor"])))
        return progress, recovered

    def _may_use(self, lineage: Lineage, gate: Gate) -> Callable[[Version], bool]:
        """Where the gate waits, an episode of an abandoned version, or of one too old, is sampled again; else the gate
        judges it."""
        if gate.config.effective_on_stale is not OnStale.WAIT:
            return lambda version: True
        return lambda version: lineage.in_line(version) and lineage.lag(version) <= gate.config.max_lag

    def _renew(self, parts: Parts) -> None:
        """A run that goes on under a tighter bound leaves what cannot keep it, and asks for these prompts again."""
        gate, may_use = parts.gate, self._may_use(parts.lineage, parts.gate)
        if gate.config.effective_on_stale is not OnStale.WAIT:
            return

        def too_old(scored: Scored) -> bool:
            turns = scored.episode.sampled_turns()
            return not all(may_use(span.version) for turn in turns for span in turn.spans)

        left = parts.buffer.renew(too_old)
        reason = f"sampled under a wider bound than max_lag = {gate.config.max_lag}, before the resume"
        if left:
            parts.journal.write_now(*(
                DispositionRecord(each.episode.id, each.episode.group_id, Disposition.DROPPED, reason=reason)
                for each in left
            ))  # fmt: skip

    def _sinks(self, stack: AsyncExitStack, batch: int) -> list[MetricSink]:
        config = self._config
        sinks, close = open_sinks(
            config.obs, self._folder, name=config.name, settings=config.model_dump(mode="json"), resume=self._resume,
            tell=self._view.log,
        )  # fmt: skip
        stack.callback(close)
        for sink in sinks:
            if self._resume:
                sink.truncate_after(batch)
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


def make_evaluator(
    stack: AsyncExitStack, config: RunConfig, rollout: Rollout, journal: Journal, data: Data
) -> Evaluator:
    """The evaluator of a recipe, with the evaluation's own rewards and sampling."""
    require(data.held_out, "held-out prompts")
    chosen = config.evaluation
    rubric = Rubric(chosen.rewards or config.rewards, Means(Sandbox))
    stack.push_async_callback(rubric.close)
    rubric.check({prompt.task for prompt in data.held_out})
    rubric.check_prompts(data.held_out)
    judge = Producer(
        rollout.runner, rubric, rollout.chat, journal, seed=config.seed, recovered={}, may_use=lambda version: True,
        stall_seconds=config.limits.stall_seconds,
    )  # fmt: skip
    sampling = (chosen.sampling or config.rollout.sampling).params(eos=rollout.chat.eos)
    return Evaluator(
        rollout.runner, judge, rollout.chat, journal, data.held_out, sampling=sampling, samples=chosen.samples,
        greedy=chosen.greedy, show=chosen.show, seed=config.seed,
    )  # fmt: skip


async def evaluate_model(config: RunConfig, model: Path | None, tell: Callable[[str], None]) -> EvalResult:
    """Measure a model folder, or the newest checkpoint of the run, on the held-out prompts."""
    template = config.model.chat_template if model is not None else None  # a checkpoint has its own
    if model is None:
        checkpoint = CheckpointStore(config.folder / "checkpoints", keep=1).latest()
        if checkpoint is None:
            raise ConfigError(f"{config.folder} has no checkpoint", hint="name a model: --model FOLDER")
        model = checkpoint.model
    data = load_data(config.data, seed=config.seed)
    tokenizer = load_templated(model, template)
    engine = embedded_engine(
        config.rollout.embedded, model, tokenizer, device=device.resolve(config.device), version=Version(0)
    )
    here = config.rollout.model_copy(update={"engine": "embedded"})
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        writer = stack.enter_context(LogWriter(scratch / "log"))
        rollout = await open_rollout(
            stack, here, engine, tokenizer, folder=scratch, template_kwargs=config.model.chat_template_kwargs, tell=tell
        )
        return await make_evaluator(stack, config, rollout, Journal(writer), data)(0, Version(0))


def facts(config: RunConfig, data: Data, device_name: str) -> dict[str, str]:
    """What the view shows beside the run's name."""
    scratch = config.model.scratch
    return {
        "model": f"{scratch.architecture['model_type']} from scratch" if scratch else str(config.model.path),
        "task": f"{', '.join(sorted(data.tasks))}: {len(data.train)} prompts, {len(data.held_out)} held out",
        "algorithm": config.algorithm.type,
        "engine": config.rollout.engine,
        "device": device_name,
    }
