"""A run that samples: runners and gateway in this process; the engine too, or servers beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from sluice import device
from sluice.algos.base import Algorithm
from sluice.checkpoint.store import CheckpointStore
from sluice.config.run import RunConfig
from sluice.config.runners import SingleTurnRunner
from sluice.data.gate import Gate
from sluice.errors import ConfigError
from sluice.log.writer import LogWriter
from sluice.models.build import load_tokenizer
from sluice.models.chat_template import load_templated
from sluice.orchestrate.assignment import assign, assign_evaluation, spare
from sluice.orchestrate.evaluation import EvalResult, Evaluator
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.pool import Apart, Shared
from sluice.orchestrate.producer import Found, Producer
from sluice.orchestrate.refusal import refusal
from sluice.orchestrate.run import Run, Supply
from sluice.orchestrate.scaling import Scaler
from sluice.orchestrate.serving import Rollout, open_rollout
from sluice.orchestrate.setup import (
    Data,
    check_prompts,
    embedded_engine,
    load_data,
    make_engine,
    make_filters,
    make_strategy,
    require,
)
from sluice.orchestrate.stall import Stall
from sluice.orchestrate.turns import TurnLog
from sluice.rewards.means import Means
from sluice.rewards.rubric import Rubric
from sluice.rollout.engines.continuing import Continuing
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.rollout.engines.sglang import SGLangFleet
from sluice.sandbox.sandbox import Sandbox
from sluice.types import Version
from sluice.weights.base import Sink
from sluice.weights.lineage import Lineage


class InlineRun(Run):
    """A run on new episodes."""

    def _check(self, stack: AsyncExitStack, data: Data) -> None:
        self._rubric = rubric = Rubric(self._config.rewards, Means(Sandbox))
        stack.push_async_callback(rubric.close)
        rubric.check(data.tasks, complete=True)
        rubric.check_prompts(data.trained)

    def _facts(self, data: Data) -> dict[str, str]:
        return facts(self._config, data, self._device)

    async def _supply(
        self, stack: AsyncExitStack, start: Path, data: Data, journal: Journal, algorithm: Algorithm, lineage: Lineage
    ) -> Supply:
        config = self._config
        tokenizer = load_tokenizer(start)
        engine, sink = make_engine(
            assign(config, self._device) if config.placement.runtime == "inline" else config.rollout,
            start, tokenizer, device=self._device, folder=self._folder, tell=self._view.log, hosts=self._hosts,
            shares=config.placement.colocate, spare=spare(config, self._device),
        )  # fmt: skip
        gate = Gate(config.data.gate, config.groups_per_step, algorithm.updates_per_batch)
        turns = self._turn_log(stack, gate, lineage)
        continuing = Continuing(engine, turns) if turns is not None else None
        rollout = await open_rollout(
            stack, config.rollout, continuing or engine, tokenizer, folder=self._folder,
            template_kwargs=config.model.chat_template_kwargs, tell=self._view.log,
            beside=(*config.rewards, *(config.evaluation.rewards or ())),
        )  # fmt: skip
        if isinstance(engine, SGLangFleet) and engine.elastic.growth is not None:
            Scaler(self._folder, engine.elastic, journal, self._view.log).open(stack)
        check_prompts(rollout.runner, data, config.rollout.sampling.max_new_tokens)
        pool = Shared(engine, sink, self._timer, self._device) if config.placement.colocate else Apart(sink)
        await pool.vacate()
        stall = Stall(config.limits.stall_seconds)

        def produce(found: Found) -> Producer:
            if turns is not None and self._resume and (kept := turns.recall(found.episodes, found.first_group)):
                self._view.log(f"unfinished episodes go on from {kept} turns")
            return Producer(
                rollout.runner, self._rubric, rollout.chat, journal, seed=config.seed, recovered=found.episodes,
                refusal=refusal(gate, lineage), stall=stall, retries=config.rollout.retries, turns=continuing,
            )  # fmt: skip

        def figures() -> dict[str, float]:
            own = engine.figures() if isinstance(engine, SGLangFleet) else {}
            return own | (continuing.figures() if continuing is not None else {})

        return Supply(
            gate=gate,
            strategy=make_strategy(config.data, data, seed=config.seed),
            sampling=config.rollout.sampling.params(eos=rollout.chat.eos),
            filters=make_filters(config.data),
            pool=pool,
            produce=produce,
            evaluator=await self._evaluator(stack, start, rollout, journal, data, stall),
            elsewhere=not isinstance(engine, EmbeddedEngine),
            figures=figures,
            tasks=data.tasks,
        )

    def _turn_log(self, stack: AsyncExitStack, gate: Gate, lineage: Lineage) -> TurnLog | None:
        """None where an episode is one turn."""
        if isinstance(self._config.rollout.runner, SingleTurnRunner):
            return None
        turns = TurnLog(self._folder / "turns", gate=gate, lineage=lineage, tell=self._view.log)
        stack.callback(turns.close)
        return turns

    async def _evaluator(
        self, stack: AsyncExitStack, start: Path, rollout: Rollout, journal: Journal, data: Data, stall: Stall
    ) -> Evaluator | None:
        """On the run's engine, or on servers of its own, started here."""
        config, folder = self._config, self._folder / "evaluation"
        if not data.held_out:
            return None
        if not config.evaluation.servers:
            return make_evaluator(stack, config, rollout, journal, data, stall)
        own, tokenizer = assign_evaluation(config, self._device), load_tokenizer(start)

        def tell(line: str) -> None:
            self._view.log(f"evaluation: {line}")

        engine, sink = make_engine(
            own, start, tokenizer, device=self._device, folder=folder, tell=tell, hosts=self._measuring, spare=[]
        )
        rollout = await open_rollout(
            stack, own, engine, tokenizer, folder=folder, template_kwargs=config.model.chat_template_kwargs, tell=tell,
            beside=(*config.rewards, *(config.evaluation.rewards or ())),
        )  # fmt: skip
        return make_evaluator(stack, config, rollout, journal, data, Stall(config.limits.stall_seconds), sink)


def make_evaluator(
    stack: AsyncExitStack,
    config: RunConfig,
    rollout: Rollout,
    journal: Journal,
    data: Data,
    stall: Stall,
    sink: Sink | None = None,
) -> Evaluator:
    """The evaluator of a recipe, with its own rewards and sampling; see `Evaluator` for `stall` and `sink`."""
    require(data.held_out, "held-out prompts")
    chosen = config.evaluation
    rubric = Rubric(chosen.rewards or config.rewards, Means(Sandbox))
    stack.push_async_callback(rubric.close)
    rubric.check({prompt.task for prompt in data.held_out})
    rubric.check_prompts(data.held_out)
    judge = Producer(
        rollout.runner, rubric, rollout.chat, journal, seed=config.seed, recovered={},
        stall=stall, refusal=lambda version, due: "",
    )  # fmt: skip
    sampling = (chosen.sampling or config.rollout.sampling).params(eos=rollout.chat.eos)
    return Evaluator(
        rollout.runner, judge, rollout.chat, journal, data.held_out, sampling=sampling, samples=chosen.samples,
        greedy=chosen.greedy, show=chosen.show, seed=config.seed, stall=stall, sink=sink,
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
        evaluator = make_evaluator(stack, config, rollout, Journal(writer), data, Stall(config.limits.stall_seconds))
        return await evaluator(0, Version(0))


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
