"""Several ranks behind the trainer protocol: the controller's side."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sluice.config.train import TrainConfig
from sluice.errors import TrainError
from sluice.plugins import loaded_files
from sluice.train.base import Loss, Snapshot, StepStats
from sluice.train.layout import Layout
from sluice.train.packing import check_fit, split_over, spread
from sluice.train.ranks.crew import Crew
from sluice.train.ranks.spec import RankSpec
from sluice.train.ranks.weights import read_weights
from sluice.train.ranks.work import StepPart
from sluice.train.schedule import learning_rate
from sluice.train.totals import StepTotals
from sluice.types import TrainBatch, TrainSample


class RankedTrainer:
    """Implements `train.base.Trainer` over a crew of ranks, with the backend that `config` names.

    Every batch is shared out by tokens over the replicas of the model (`Layout`); each makes as many passes as any
    other. Gradients are summed over replicas, and figures are put together here from what each tells of its tokens, so
    neither depends on the split.

    Args:
        crew: the ranks, started and not begun; they end with the trainer, or when it cannot be made.
        config, model_folder, total_steps, seed, frozen: see `TorchTrainer`.
        devices: of each rank.
        scratch: folder that all ranks and this process see; for the meeting of the ranks and for weights on their way.
        threads: of torch at each rank.

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
    ) -> None:
        self._crew = crew
        self._config = config
        self._layout = Layout.of(config, ranks=crew.size)
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
                    loaded_files(), threads,
                )
                for rank, device in enumerate(devices)
            ]  # fmt: skip
            self._call("begin", [(spec,) for spec in specs])
        except BaseException:
            self.close()
            raise

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._crew.call(method, arguments, seconds=self._config.rank_seconds)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._call(method, [arguments] * self._crew.size)

    def close(self) -> None:
        """End the ranks. Harmless when repeated."""
        self._crew.close()
        self._meeting.cleanup()

    def _runs_alone(self, stream: str) -> bool:
        """Whether a pass for `stream` holds one sample; every rank says the same."""
        if stream not in self._alone:
            self._alone[stream] = bool(self._all("alone", stream)[0])
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
        budget = self._config.micro_batch_tokens
        check_fit(samples, budget)
        names = sorted(streams)
        alone = any(self._runs_alone(name) for name in names)
        shares = spread(
            [len(sample) for sample in samples], self._layout.replicas, budget, alone=alone,
            multiple=self._layout.passes_multiple,
        )  # fmt: skip
        passes = [[[samples[index] for index in members] for members in share] for share in shares]
        found: list[dict[str, list[np.ndarray]]] = self._shared("score", [(names, mine) for mine in passes])
        filled = list(samples)
        for share, values in zip(shares, found, strict=True):
            for number, members in enumerate(share):
                ends = np.cumsum([len(samples[index]) for index in members])[:-1]
                for name in names:
                    parts = np.split(values[name][number], ends) if members else []
                    for index, part in zip(members, parts, strict=True):
                        filled[index] = filled[index].with_streams(**{name: part})
        return filled

    def step(self, batch: TrainBatch, loss: Loss) -> StepStats:
        """See `Trainer.step`."""
        if not any(sample.num_trained_tokens for sample in batch.samples):
            return StepTotals(batch).skipped(
                lr=learning_rate(self._config.optimizer, self._steps_done, self._total_steps)
            )
        shares, whole = self._shares(batch)
        totals = StepTotals(whole)
        parts: list[StepPart] = self._shared("step", [(share, loss, totals.streams) for share in shares])
        for share, part in zip(shares, parts, strict=True):
            for micro, result in zip(share, part.results, strict=True):
                if result is not None:
                    totals.add(micro, result)
        if not np.isfinite(parts[0].grad_norm):
            raise totals.not_finite()
        self._steps_done += 1
        return totals.stats(grad_norm=parts[0].grad_norm, lr=parts[0].lr)

    def gradients(self, batch: TrainBatch, loss: Loss) -> dict[str, Tensor]:
        """The gradient of the step's loss by parameter name, before clipping. For tests and inspection."""
        shares, whole = self._shares(batch)
        streams = StepTotals(whole).streams
        parts: list[dict[str, Tensor]] = self._call(
            "gradients", self._layout.to_ranks([(share, loss, streams) for share in shares])
        )
        return {name: gradient for part in parts for name, gradient in part.items()}

    def _shared(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call every rank with the arguments of its replica; what the replicas answer."""
        return self._layout.from_ranks(self._call(method, self._layout.to_ranks(arguments)))

    def _shares(self, batch: TrainBatch) -> tuple[list[Any], TrainBatch]:
        """The batch's micro-batches by replica, and the batch that they make together."""
        shares = split_over(
            batch, self._layout.replicas, self._config.micro_batch_tokens, alone=self._runs_alone("proximal"),
            multiple=self._layout.passes_multiple,
        )  # fmt: skip
        return shares, TrainBatch(tuple(micro for share in shares for micro in share if micro.samples))

    def offload(self) -> None:
        """See `Trainer.offload`."""
        self._all("offload")

    def onload(self) -> None:
        """See `Trainer.onload`."""
        self._all("onload")

    # ── weights and state ───────────────────────────────────────────────────────────────────────────────

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer.named_weights`. They pass through files that are gone when this ends.

        Raises:
            TrainError: two ranks wrote a tensor of one name.
        """
        with tempfile.TemporaryDirectory(prefix="weights-", dir=self._scratch) as folder:
            self._all("write_weights", Path(folder))
            yield from read_weights(Path(folder))

    def snapshot(self, *, copy: bool = True) -> Snapshot:
        """See `Trainer.snapshot`. Ranks hold it, and those that have something of it write that beside what all are
        called for."""
        holders = [rank for rank, holds in enumerate(self._all("snapshot", copy)) if holds]
        return Snapshot(partial(self._write, holders, "model"), partial(self._write, holders, "state"))

    def _write(self, holders: Sequence[int], part: str, folder: Path) -> None:
        self._crew.beside("write", part, folder.absolute(), ranks=holders, seconds=self._config.rank_seconds)

    def save_model(self, folder: Path) -> None:
        """See `Trainer.save_model`."""
        self._all("save_model", folder.absolute())

    def save_state(self, folder: Path) -> None:
        """See `Trainer.save_state`. Any number of ranks reads it again, one without ranks too."""
        self._all("save_state", folder.absolute())

    def load_state(self, model: Path, state: Path) -> None:
        """See `Trainer.load_state`."""
        self._steps_done = int(self._all("load_state", model.absolute(), state.absolute())[0])

    def peak_memory(self) -> list[int]:
        """See `Trainer.peak_memory`."""
        return [int(found) for found in self._all("peak_memory")]
