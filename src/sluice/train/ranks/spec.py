"""What a rank needs to begin. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sluice.config.train import TrainConfig
from sluice.train.layout import Layout


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank of a trainer.

    Attributes:
        rank, world: which one of how many.
        meeting: where the process group forms: a file that all ranks see and nobody has used before, or
            `tcp://host:port` of a store that is open there, see `work.open_store`.
        model_folder, total_steps, seed, frozen, config: see `TorchTrainer`.
        device: `cpu`, or `cuda:N` of this process.
        plugins: files of the user's own code that were loaded in the controller.
        threads: of torch; None leaves its choice.
        worker: module and class of the rank's `Worker`, such as one that measures; None is the backend's own.
    """

    rank: int
    world: int
    meeting: str
    config: TrainConfig
    model_folder: Path
    total_steps: int
    seed: int
    device: str
    frozen: Mapping[str, Path]
    plugins: tuple[Path, ...] = ()
    threads: int | None = None
    worker: tuple[str, str] | None = None

    @property
    def layout(self) -> Layout:
        """Of all ranks."""
        return Layout.of(self.config, ranks=self.world)
