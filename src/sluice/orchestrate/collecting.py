"""A run that trains nothing: episodes are sampled, rewarded, filtered and logged, batch by batch, by one version."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from torch import Tensor

from sluice.algos.base import Algorithm
from sluice.errors import TrainError
from sluice.log.records import Disposition, DispositionRecord
from sluice.orchestrate.batch_metrics import rollout_metrics, task_metrics
from sluice.orchestrate.fates import excluded
from sluice.orchestrate.inline import InlineRun
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.limits import check_infrastructure
from sluice.orchestrate.loop import Loop, Parts, Progress
from sluice.orchestrate.serve import FolderSource
from sluice.orchestrate.serving import Rollout
from sluice.orchestrate.setup import Data
from sluice.orchestrate.stall import Stall
from sluice.train.base import Critic, Loss, Snapshot, StepStats, Trainer
from sluice.types import Group, Scored, TrainBatch, TrainSample


class CollectRun(InlineRun):
    """`config.rollout_only`: the log that it leaves is what `config.replay` trains."""

    def _facts(self, data: Data) -> dict[str, str]:
        return super()._facts(data) | {"algorithm": "none: nothing is trained"}

    def _count_memory(self, algorithm: Algorithm) -> None:
        """There is no trainer to find room for."""

    async def _evaluator(
        self, stack: AsyncExitStack, start: Path, rollout: Rollout, journal: Journal, data: Data, stall: Stall
    ) -> None:
        """Held-out prompts are asked once something was trained."""

    def _make_trainer(
        self, stack: AsyncExitStack, start: Path, algorithm: Algorithm, frozen: Mapping[str, Path]
    ) -> tuple[Trainer, Critic | None]:
        return Untrained(start), None

    def _make_loop(self, parts: Parts, progress: Progress) -> Loop:
        return CollectLoop(self._config, parts, progress)


class CollectLoop(Loop):
    """The loop with batches that are counted and let go."""

    async def _train(self, groups: list[Group]) -> dict[str, float]:
        parts, progress = self._parts, self.progress
        check_infrastructure(groups, self._config.limits)
        await parts.journal.write(*(_fate(member) for group in groups for member in group.members))
        parts.buffer.trained()
        progress.batch += 1
        metrics = rollout_metrics(groups, self._dropped)
        if len(parts.tasks) > 1:
            metrics |= task_metrics(groups, self._dropped, ())
        metrics["version/step"], metrics["version/attempt"] = self._in_use()
        self._count(groups, [])
        return metrics


def _fate(member: Scored) -> DispositionRecord:
    episode = member.episode
    if not episode.outcome.counts:
        return excluded(episode)
    return DispositionRecord(episode.id, episode.group_id, Disposition.KEPT)


class Untrained:
    """The weights of a folder, in the place of a trainer. See `train.base.Trainer`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return FolderSource(self._folder).named_weights()

    def snapshot(self, *, copy: bool = True) -> Snapshot:
        """The folder, which does not change."""
        return Snapshot(self.save_model, self.save_state)

    def save_model(self, folder: Path) -> None:
        """A copy of the folder's files."""
        for file in self._folder.iterdir():
            if file.is_file():
                shutil.copy2(file, folder / file.name)

    def save_state(self, folder: Path) -> None:
        """There is none."""

    def load_state(self, model: Path, state: Path) -> None:
        """The weights are still those of the folder."""

    def offload(self) -> None:
        """Nothing is on any device."""

    def onload(self) -> None:
        """Nothing is to be there."""

    def peak_memory(self) -> list[int]:
        return []

    def score(self, samples: Sequence[TrainSample], streams: frozenset[str]) -> list[TrainSample]:
        raise TrainError("this run trains nothing: there is no trainer to score samples")

    def step(self, batch: TrainBatch, loss: Loss) -> StepStats:
        raise TrainError("this run trains nothing: there is no trainer to make a step")
