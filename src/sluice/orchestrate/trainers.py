"""Where a policy is trained: in this process, or by ranks that it starts. Megatron always has ranks: its process groups
are of a whole process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sluice import device as devices
from sluice.config.train import TrainConfig
from sluice.train.backends.torch import TorchTrainer
from sluice.train.base import Trainer
from sluice.train.ranks.crew import Crew, ProcessCrew
from sluice.train.ranks.trainer import RankedTrainer


@dataclass(frozen=True, slots=True)
class Trainers:
    """Opens trainers on this host: the run's own, and those of the phases before it.

    Attributes:
        device: resolved device of the run; further ranks take the accelerators after it.
        threads: of torch, in this process and at each rank; None leaves the choice, shared out among ranks.
        folder: of the run; ranks have `folder/ranks`, with their logs.
    """

    device: str
    folder: Path
    threads: int | None = None

    @contextmanager
    def open(
        self,
        name: str,
        config: TrainConfig,
        model: Path,
        *,
        total_steps: int,
        seed: int,
        frozen: Mapping[str, Path] | None = None,
    ) -> Iterator[Trainer]:
        """A trainer for the length of the block; see `TorchTrainer` for the arguments.

        Args:
            name: of what is trained, for the folder of the ranks' logs.

        Raises:
            ConfigError: there are fewer accelerators than ranks, or the folder is no usable model.
        """
        if config.backend == "torch" and config.ranks == 1 and self._alone:
            yield TorchTrainer(config, model, total_steps=total_steps, seed=seed, device=self.device, frozen=frozen)
            return
        places = self._places(config.ranks)
        home = self.folder.absolute() / "ranks" / name
        shutil.rmtree(home / "scratch", ignore_errors=True)  # of a controller that was killed
        threads = self.threads or max(1, (os.cpu_count() or 1) // config.ranks)
        crew = self._crew(config.ranks, home, threads)
        trainer = RankedTrainer(
            crew, config, model, total_steps=total_steps, seed=seed, devices=places, scratch=home / "scratch",
            frozen=frozen, threads=threads,
        )  # fmt: skip
        with closing(trainer):
            yield trainer

    @property
    def _alone(self) -> bool:
        """Whether a single rank of the torch backend is this process itself."""
        return True

    def _places(self, ranks: int) -> list[str]:
        return devices.several(self.device, ranks)

    def _crew(self, ranks: int, home: Path, threads: int) -> Crew:
        environment = {"OMP_NUM_THREADS": str(threads)}
        if "GLOO_SOCKET_IFNAME" not in os.environ:  # else gloo asks for the host's name, which not every host knows
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        return ProcessCrew(ranks, home, [environment] * ranks)
