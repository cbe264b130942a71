"""A run that trains on the log of an earlier one: the loop of every run, with no engine and no evaluation."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from sluice.algos.base import Algorithm
from sluice.models.build import load_tokenizer
from sluice.orchestrate.inline import facts
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.pool import Apart
from sluice.orchestrate.producer import Found, Producer
from sluice.orchestrate.refusal import refusal
from sluice.orchestrate.replay import (
    NoEngine,
    RecordedStrategy,
    Recording,
    ReplayProducer,
    check_lag,
    recorded_groups,
    replay_gate,
)
from sluice.orchestrate.run import Run, Supply
from sluice.orchestrate.setup import Data
from sluice.orchestrate.stall import Stall
from sluice.rewards.means import Means
from sluice.rewards.rubric import Rubric
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.sandbox.sandbox import Sandbox
from sluice.weights.lineage import Lineage


class ReplayRun(Run):
    """`config.replay` names the earlier run. Checkpoints, log, metrics and resume are those of any run."""

    def _check(self, stack: AsyncExitStack, data: Data) -> None:
        self._rubric = Rubric(self._config.rewards if self._again else (), Means(Sandbox))
        stack.push_async_callback(self._rubric.close)

    @property
    def _again(self) -> bool:
        return self._config.replay_rewards == "again"

    def _facts(self, data: Data) -> dict[str, str]:
        return facts(self._config, data, self._device) | {"engine": f"none: replays {self._config.replay}"}

    async def _supply(
        self, stack: AsyncExitStack, start: Path, data: Data, journal: Journal, algorithm: Algorithm, lineage: Lineage
    ) -> Supply:
        config = self._config
        assert config.replay is not None  # the caller chose this class by it
        groups = recorded_groups(
            config.replay, config.steps * config.groups_per_step, start, groups_per_step=config.groups_per_step,
            updates=algorithm.updates_per_batch,
        )  # fmt: skip
        check_lag(config.data.gate, groups)
        if self._again:
            self._rubric.check({group.prompt.task for group in groups}, complete=True)
            self._rubric.check_prompts([group.prompt for group in groups])
        renderer = ChatRenderer(load_tokenizer(start))
        gate = replay_gate(config.data.gate, config.groups_per_step, algorithm.updates_per_batch)

        def produce(found: Found) -> Producer:
            return ReplayProducer(
                Recording(groups, lineage), self._rubric, renderer, journal, seed=config.seed, recovered=found.episodes,
                refusal=refusal(gate, lineage), stall=Stall(config.limits.stall_seconds), again=self._again,
            )  # fmt: skip

        return Supply(
            gate=gate,
            strategy=RecordedStrategy(groups),
            sampling=config.rollout.sampling.params(eos=renderer.eos),
            filters=(),
            pool=Apart(NoEngine()),
            produce=produce,
            evaluator=None,
            elsewhere=False,
            figures=dict,
            tasks={group.prompt.task for group in groups},
        )
