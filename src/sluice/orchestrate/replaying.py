"""A run that trains on the log of an earlier one: the loop of every run, with no engine and no evaluation."""

from __future__ import annotations

from contextlib import AsyncExitStack

from sluice import __version__
from sluice.algos import make_algorithm
from sluice.checkpoint.store import CheckpointStore
from sluice.data.buffer import Buffer
from sluice.log.records import RunRecord
from sluice.log.writer import LogWriter
from sluice.models.build import load_tokenizer
from sluice.obs.summary import Summary
from sluice.orchestrate.beside import Beside
from sluice.orchestrate.folder import digest
from sluice.orchestrate.inline import InlineRun, facts
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.learner import Learner
from sluice.orchestrate.loop import Loop, Parts
from sluice.orchestrate.pool import Apart
from sluice.orchestrate.recovery import logged_versions
from sluice.orchestrate.replay import (
    NoEngine,
    RecordedStrategy,
    Recording,
    ReplayProducer,
    check_lag,
    recorded_groups,
    replay_gate,
)
from sluice.orchestrate.setup import initial_model, load_data, make_critic, total_updates
from sluice.orchestrate.streams import frozen_policies
from sluice.rewards.rubric import Rubric
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore


class ReplayRun(InlineRun):
    """`config.replay` names the earlier run. Checkpoints, log, metrics and resume are those of any run."""

    async def run(self) -> Summary:
        """The whole run. Everything that was opened is closed again, whatever happens."""
        config, folder = self._config, self._folder
        assert config.replay is not None  # the caller chose this class by it
        checkpoints = CheckpointStore(folder / "checkpoints", keep=config.checkpoint.keep)
        async with AsyncExitStack() as stack:
            durability = "power" if config.log.power_safe else "process"
            journal = Journal(
                stack.enter_context(
                    LogWriter(folder / "log", rotate_bytes=config.log.rotate_bytes, durability=durability)
                )
            )
            checkpoint = checkpoints.latest() if self._resume else None
            data = load_data(config.data, seed=config.seed)
            journal.write_now(RunRecord(digest(config), config.seed, __version__))
            shown = facts(config, data, self._device) | {"engine": f"none: replays {config.replay}"}
            self._view.start(config.name, config.steps, str(folder), shown)
            stack.callback(self._view.close)

            algorithm = make_algorithm(config.algorithm, max_new_tokens=config.rollout.sampling.max_new_tokens)
            frozen = frozen_policies(algorithm, config.teachers, initial_model(config, folder))
            start = self._start_model(checkpoint, data)
            groups = recorded_groups(config.replay, config.steps * config.groups_per_step, start)
            check_lag(config.data.gate, groups)
            trainer = stack.enter_context(
                self._trainers.open(
                    "policy", config.train, start, total_steps=total_updates(config, algorithm), seed=config.seed,
                    frozen=frozen,
                )
            )  # fmt: skip
            critic = make_critic(config, algorithm, start, device=self._device)
            renderer = ChatRenderer(load_tokenizer(start))
            gate = replay_gate(config.data.gate, config.groups_per_step, algorithm.updates_per_batch)
            buffer = Buffer(gate, RecordedStrategy(groups), sampling=config.rollout.sampling.params(eos=renderer.eos))
            lineage = Lineage(logged_versions(folder / "log") if self._resume else ())
            progress, recovered = self._restore(checkpoint, buffer, lineage, trainer, critic, journal)
            producer = ReplayProducer(
                Recording(groups, lineage), Rubric(()), renderer, journal, seed=config.seed, recovered=recovered,
                may_use=self._may_use(lineage, gate), stall_seconds=config.limits.stall_seconds,
            )  # fmt: skip
            stack.push_async_callback(producer.close)
            beside = Beside(apart=False, threads=config.threads)
            stack.callback(beside.close)
            parts = Parts(
                pool=Apart(NoEngine()), producer=producer, evaluator=None, trainer=trainer, critic=critic,
                algorithm=algorithm,
                learner=Learner(trainer, algorithm, critic, micro_batch_tokens=config.train.micro_batch_tokens),
                buffer=buffer, gate=gate, lineage=lineage, store=WeightStore(folder / "weights", start, lineage),
                checkpoints=checkpoints, journal=journal, sinks=self._sinks(stack, progress.batch), view=self._view,
                timer=self._timer, beside=beside, figures=dict,
                tasks={group.prompt.task for group in groups},
            )  # fmt: skip
            return await self._drive(Loop(config, parts, progress), parts, fresh=checkpoint is None)
