"""Ranks of the Megatron backend that tests borrow: they begin anew for every layout, as starting takes the longest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.tiny import SCRATCH, merge
from tests.unit.family_cases import even, family

from sluice.config.model import ScratchConfig
from sluice.config.train import TrainConfig
from sluice.models.build import make_scratch
from sluice.train.ranks.crew import ProcessCrew
from sluice.train.ranks.trainer import RankedTrainer

OPTIMIZER = {"lr": 3e-2, "warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1, "eps": 1e-4}
"""With AdamW's usual epsilon a first update is the gradient's sign, which rounding decides where there is none."""
FAMILIES = ("llama", "qwen2", "qwen3", "glm4")
LAYOUTS: dict[int, tuple[dict[str, Any], ...]] = {
    1: ({},),
    2: (
        {"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}, {},
        {"distributed_optimizer": False, "overlap": False},
    ),
    4: (
        {"tp": 2, "pp": 2}, {"tp": 2, "cp": 2}, {"pp": 2, "cp": 2}, {"tp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}, {},
        {"tp": 2, "pp": 2, "vpp": 2},
    ),
}  # fmt: skip
"""By number of ranks; what is left over divides the batch."""


def cases(layouts: Sequence[tuple[int, dict[str, Any]]], *, quick: Sequence[tuple[int, dict[str, Any]]]) -> list[Any]:
    """Parameters of a test in several layouts, of which those in `quick` run with the quick tests."""
    return [
        pytest.param(*each, id=f"{each[0]}-{each[1]}", marks=[] if each in quick else [pytest.mark.slow])
        for each in layouts
    ]


def settings(ranks: int, layout: Mapping[str, Any], **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "backend": "megatron", "ranks": ranks, "megatron": dict(layout), "optimizer": OPTIMIZER,
            "micro_batch_tokens": 64, "logprob_chunk": 16, "rank_seconds": 120, **changes,
        }
    )  # fmt: skip


def tiny(folder: Path, name: str, **changes: Any) -> Path:
    """A model of the family that two and four ranks divide."""
    return even(family(folder, name, num_hidden_layers=4, **changes))


def small(folder: Path, **architecture: Any) -> Path:
    """A model for whole runs, with the tokenizer of `tests.tiny`: two ranks divide it, in two blocks each."""
    chosen = merge(SCRATCH, {"architecture": {"num_hidden_layers": 4, **architecture}})
    make_scratch(ScratchConfig.model_validate(chosen), folder, seed=0)
    return even(folder, 34)


class _Lent(ProcessCrew):
    """Stays when a trainer is closed."""

    def close(self) -> None:
        pass

    @property
    def usable(self) -> bool:
        return not self._ended and all(psutil.pid_exists(pid) for pid in self.pids)

    def end(self) -> None:
        super().close()


class Rig:
    """Args: folder: for logs and for weights on their way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._crews: dict[int, _Lent] = {}

    @contextmanager
    def trainer(
        self,
        ranks: int,
        model: Path,
        layout: Mapping[str, Any],
        *,
        frozen: Mapping[str, Path] | None = None,
        **train: Any,
    ) -> Iterator[RankedTrainer]:
        """A trainer on the first weights of `model`, over borrowed ranks."""
        trainer = RankedTrainer(
            self.crew(ranks), settings(ranks, layout, **train), model, total_steps=10, seed=0, devices=["cpu"] * ranks,
            scratch=self._folder / "scratch", frozen=frozen, threads=1,
        )  # fmt: skip
        try:
            yield trainer
        finally:
            trainer.close()

    def crew(self, ranks: int) -> ProcessCrew:
        """Borrowed ranks that have not begun, or will begin anew."""
        crew = self._crews.get(ranks)
        if crew is None or not crew.usable:
            crew = self._crews[ranks] = _Lent(
                ranks, self._folder / f"ranks-{ranks}", [{"OMP_NUM_THREADS": "1"}] * ranks
            )
        return crew

    def end(self) -> None:
        for crew in self._crews.values():
            crew.end()
