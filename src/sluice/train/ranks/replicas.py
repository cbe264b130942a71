"""A crew as replicas of a model: what is shared out over them, and what they answer put together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sluice.config.train import TrainConfig
from sluice.train.base import Loss, StepStats, ValueLoss, Writer
from sluice.train.layout import Layout
from sluice.train.packing import check_fit, split_over, spread
from sluice.train.ranks.crew import Crew
from sluice.train.ranks.work import StepPart
from sluice.train.totals import StepTotals
from sluice.types import TrainBatch, TrainSample


class Replicas:
    """Every batch is shared out by tokens over the replicas (`Layout`); each makes as many passes as any other.

    Gradients are summed over replicas, and figures are put together here from what each tells of its tokens, so neither
    depends on the split.

    Args:
        crew: the ranks.
        config: the layout, the budget of a pass, the deadline of a call.
    """

    def __init__(self, crew: Crew, config: TrainConfig) -> None:
        self._crew = crew
        self._config = config
        self.layout = Layout.of(config, ranks=crew.size)

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call `method` at every rank with its arguments; see `Crew.call`."""
        return self._crew.call(method, arguments, seconds=self._config.rank_seconds)

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """The same with the same arguments for each."""
        return self.each(method, [arguments] * self._crew.size)

    def shared(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call every rank with the arguments of its replica; what the replicas answer."""
        return self.layout.from_ranks(self.each(method, self.layout.to_ranks(arguments)))

    def shares(self, batch: TrainBatch, *, alone: bool) -> tuple[list[Any], TrainBatch]:
        """The batch's micro-batches by replica, and the batch that they make together."""
        shares = split_over(
            batch, self.layout.replicas, self._config.micro_batch_tokens, alone=alone,
            multiple=self.layout.passes_multiple,
        )  # fmt: skip
        return shares, TrainBatch(tuple(micro for share in shares for micro in share if micro.samples))

    def score(
        self, method: str, samples: Sequence[TrainSample], streams: Sequence[str], *, alone: bool
    ) -> list[TrainSample]:
        """The samples in their order, with `streams` filled by what `method` answers: by stream, then by pass."""
        check_fit(samples, self._config.micro_batch_tokens)
        shares = spread(
            [len(sample) for sample in samples], self.layout.replicas, self._config.micro_batch_tokens, alone=alone,
            multiple=self.layout.passes_multiple,
        )  # fmt: skip
        passes = [[[samples[index] for index in members] for members in share] for share in shares]
        found: list[dict[str, list[np.ndarray]]] = self.shared(method, [(list(streams), mine) for mine in passes])
        filled = list(samples)
        for share, values in zip(shares, found, strict=True):
            for number, members in enumerate(share):
                ends = np.cumsum([len(samples[index]) for index in members])[:-1]
                for name in streams:
                    parts = np.split(values[name][number], ends) if members else []
                    for index, part in zip(members, parts, strict=True):
                        filled[index] = filled[index].with_streams(**{name: part})
        return filled

    def step(self, method: str, batch: TrainBatch, loss: Loss | ValueLoss, *, alone: bool) -> StepStats:
        """One optimizer step by `method` of a batch that trains something.

        Raises:
            TrainError: loss or gradient are not finite; nothing was updated.
        """
        shares, whole = self.shares(batch, alone=alone)
        totals = StepTotals(whole)
        parts: list[StepPart] = self.shared(method, [(share, loss, totals.streams) for share in shares])
        for share, part in zip(shares, parts, strict=True):
            for micro, result in zip(share, part.results, strict=True):
                if result is not None:
                    totals.add(micro, result)
        if not np.isfinite(parts[0].grad_norm):
            raise totals.not_finite()
        return totals.stats(grad_norm=parts[0].grad_norm, lr=parts[0].lr)

    def writer(self, part: str, holders: Sequence[int]) -> Writer:
        """Writes a part of a snapshot, beside what all ranks are called for.

        Args:
            holders: ranks that have something of it.
        """
        return partial(self._write, part, holders)

    def _write(self, part: str, holders: Sequence[int], folder: Path) -> None:
        self._crew.beside("write", part, folder.absolute(), ranks=holders, seconds=self._config.rank_seconds)
