"""Several ranks behind the trainer protocol: the controller's side."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sluice.config.train import TrainConfig
from sluice.errors import TrainError
from sluice.plugins import loaded_files
from sluice.train.base import Loss, Snapshot, StepStats
from sluice.train.ranks.crew import Crew
from sluice.train.ranks.replicas import Replicas
from sluice.train.ranks.spec import RankSpec
from sluice.train.ranks.weights import read_weights
from sluice.train.schedule import learning_rate
from sluice.train.totals import StepTotals
from sluice.types import TrainBatch, TrainSample


class RankedTrainer:
    """Implements `train.base.Trainer` over a crew of ranks, with the backend that `config` names.

    How a batch is shared out over the ranks shows in no figure; see `Replicas`.

    Args:
        crew: the ranks, started and not begun; they end with the trainer, or when it cannot be made.
        config, model_folder, total_steps, seed, frozen: see `TorchTrainer`.
        devices: of each rank.
        scratch: folder that all ranks and this process see; for the meeting of the ranks and for weights on their way.
        threads: of torch at each rank.
        worker: see `RankSpec`.

    Raises:
        ConfigError, TrainError: as `TorchTrainer` does, from any rank.
    """

    def __init__(
        self,
        crew: Crew,
        config: TrainConfig,
        model_folder: Path,
        *,
        total_steps: int,
        seed: int,
        devices: Sequence[str],
        scratch: Path,
        frozen: Mapping[str, Path] | None = None,
        threads: int | None = None,
        worker: tuple[str, str] | None = None,
    ) -> None:
        self._crew = crew
        self._config = config
        self.replicas = Replicas(crew, config)
        self._total_steps = total_steps
        self._steps_done = 0
        self._streams = {"proximal", "reference", *(frozen or {})}
        scratch.mkdir(parents=True, exist_ok=True)
        self._scratch = scratch.absolute()
        self._alone: dict[str, bool] = {}
        # It stays as long as the ranks do: NCCL meets there at the first collective call, and looks in later on.
        self._meeting = tempfile.TemporaryDirectory(prefix="meeting-", dir=self._scratch)
        there = {name: path.absolute() for name, path in (frozen or {}).items()}
        try:
            where = crew.meeting(Path(self._meeting.name))
            specs = [
                RankSpec(
                    rank, crew.size, where, config, model_folder.absolute(), total_steps, seed, device, there,
                    loaded_files(), threads, worker,
                )
                for rank, device in enumerate(devices)
            ]  # fmt: skip
            self.replicas.each("begin", [(spec,) for spec in specs])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the ranks. Harmless when repeated."""
        self._crew.close()
        self._meeting.cleanup()

    def _runs_alone(self, stream: str) -> bool:
        """Whether a pass for `stream` holds one sample; every rank says the same."""
        if stream not in self._alone:
            self._alone[stream] = bool(self.replicas.all("alone", stream)[0])
        return self._alone[stream]

    # ── scoring and training ────────────────────────────────────────────────────────────────────────────

    def score(self, samples: Sequence[TrainSample], streams: frozenset[str]) -> list[TrainSample]:
        """See `Trainer.score`."""
        unknown = sorted(streams - self._streams)
        if unknown:
            raise TrainError(
                f"the {self._config.backend} trainer cannot fill the stream {unknown[0]!r}, only "
                f"{sorted(self._streams)}",
                hint="choose an algorithm that does without it",
            )
        if not samples or not streams:
            return list(samples)
        alone = any(self._runs_alone(name) for name in streams)
        return self.replicas.score("score", samples, sorted(streams), alone=alone)

    def step(self, batch: TrainBatch, loss: Loss) -> StepStats:
        """See `Trainer.step`."""
        if not any(sample.num_trained_tokens for sample in batch.samples):
            return StepTotals(batch).skipped(
                lr=learning_rate(self._config.optimizer, self._steps_done, self._total_steps)
            )
        stats = self.replicas.step("step", batch, loss, alone=self._runs_alone("proximal"))
        self._steps_done += 1
        return stats

    def gradients(self, batch: TrainBatch, loss: Loss) -> dict[str, Tensor]:
        """The gradient of the step's loss by parameter name, before clipping. For tests and inspection."""
        shares, whole = self.replicas.shares(batch, alone=self._runs_alone("proximal"))
        streams = StepTotals(whole).streams
        parts: list[dict[str, Tensor]] = self.replicas.each(
            "gradients", self.replicas.layout.to_ranks([(share, loss, streams) for share in shares])
        )
        return {name: gradient for part in parts for name, gradient in part.items()}

    def offload(self) -> None:
        """See `Trainer.offload`."""
        self.replicas.all("offload")

    def onload(self) -> None:
        """See `Trainer.onload`."""
        self.replicas.all("onload")

    # ── weights and state ───────────────────────────────────────────────────────────────────────────────

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer.named_weights`. They pass through files that are gone when this ends.

        Raises:
            TrainError: two ranks wrote a tensor of one name.
        """
        with tempfile.TemporaryDirectory(prefix="weights-", dir=self._scratch) as folder:
            self.replicas.all("write_weights", Path(folder))
            yield from read_weights(Path(folder))

    def snapshot(self, *, copy: bool = True) -> Snapshot:
        """See `Trainer.snapshot`. Ranks hold it, and those that have something of it write that beside what all are
        called for."""
        holders = [rank for rank, holds in enumerate(self.replicas.all("snapshot", copy)) if holds]
        return Snapshot(self.replicas.writer("model", holders), self.replicas.writer("state", holders))

    def save_model(self, folder: Path) -> None:
        """See `Trainer.save_model`."""
        self.replicas.all("save_model", folder.absolute())

    def save_state(self, folder: Path) -> None:
        """See `Trainer.save_state`. Any number of ranks reads it again, one without ranks too."""
        self.replicas.all("save_state", folder.absolute())

    def load_state(self, model: Path, state: Path) -> None:
        """See `Trainer.load_state`."""
        self._steps_done = int(self.replicas.all("load_state", model.absolute(), state.absolute())[0])

    def peak_memory(self) -> list[int]:
        """See `Trainer.peak_memory`."""
        return [int(found) for found in self.replicas.all("peak_memory")]
