"""A run's parts as actors: how much room they need, and who is where."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sluice.config.run import RunConfig
from sluice.errors import ConfigError
from sluice.orchestrate.ray.cluster import Part, Room, cluster
from sluice.orchestrate.ray.engines import RayHosts
from sluice.orchestrate.ray.ranks import RayCrew
from sluice.orchestrate.trainers import Trainers
from sluice.train.ranks.crew import Crew

SHARES = 10_000
"""Into how many Ray divides an accelerator at most."""


def rank_parts(config: RunConfig, device: str) -> list[Part]:
    """One for each rank of the trainer; phases before the run use the same places."""
    phases = [phase.train.ranks for phase in (config.warm_start, config.preferences) if phase is not None]
    ranks = max([config.train.ranks, *phases])
    return [Part(config.threads or 1, 0 if device == "cpu" else 1)] * ranks


def engine_parts(config: RunConfig, device: str) -> list[Part]:
    """One for each server that the run starts."""
    rollout, accelerated = config.rollout, device != "cpu"
    if rollout.engine == "embedded":
        return [Part(rollout.embedded.threads, int(accelerated))] * rollout.embedded.servers
    if rollout.engine != "sglang" or rollout.sglang.urls:
        return []
    return [
        Part(1, group.accelerators if accelerated else 0)
        for group in rollout.sglang.groups
        for _ in range(group.engines)
    ]


def evaluation_parts(config: RunConfig, device: str) -> list[Part]:
    """One for each of the evaluation's own servers. They take turns with nobody."""
    return engine_parts(config, device)[:1] * config.evaluation.servers


def by_turns(ranks: Sequence[Part], engines: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Parts of which the second kind sits in the room of the first, and finds the same accelerator there.

    Raises:
        ConfigError: an engine spans several accelerators: a rank has one.
    """
    if any(part.accelerators > 1 for part in engines):
        raise ConfigError(
            "placement.colocate with placement.runtime = 'ray' gives an engine the accelerator of one rank, and this "
            f"one takes {max(part.accelerators for part in engines)} (tp x pp x dp)",
            hint="engines of one accelerator, placement.runtime = 'inline' on one host, or placement.colocate = false",
        )
    room = max(part.cpus for part in (*ranks, *engines))
    guests = math.ceil(len(engines) / len(ranks))
    accelerators = max(part.accelerators for part in ranks)
    share = SHARES // (guests + 1) / SHARES if accelerators else 0.0
    hosts = [Part(room, accelerators, share=share) for _ in ranks]
    return hosts, [Part(p.cpus, guest_of=number % len(hosts), share=share) for number, p in enumerate(engines)]


@dataclass(frozen=True, slots=True)
class RayTrainers(Trainers):
    """Trainers whose ranks are actors, one rank too: the run's own process may have no accelerator."""

    room: Room | None = None

    @property
    def _alone(self) -> bool:
        return False

    def _places(self, ranks: int) -> list[str]:
        return ["cpu" if self.device == "cpu" else "cuda:0"] * ranks  # an actor sees its own accelerator only

    def _crew(self, ranks: int, home: Path, threads: int) -> Crew:
        assert self.room is not None  # given by `ray_placement`
        return RayCrew(ranks, self.room)


@contextmanager
def ray_placement(
    config: RunConfig, folder: Path, device: str, tell: Callable[[str], None]
) -> Iterator[tuple[RayTrainers, RayHosts, RayHosts]]:
    """Connect, reserve room for everything, give it back. See `orchestrate.placement.place`."""
    ranks, engines = rank_parts(config, device), engine_parts(config, device)
    evaluation = evaluation_parts(config, device)
    if config.placement.colocate:
        ranks, engines = by_turns(ranks, engines)
    parts = [*ranks, *evaluation, *engines]  # engines may be guests, and those come last
    first, behind = len(ranks), len(ranks) + len(evaluation)

    def tell_of_evaluation(line: str) -> None:
        tell(f"evaluation: {line}")

    cpus = sum(part.cpus for part in parts if part.guest_of is None)
    with cluster(config.placement, cpus=max(1, round(cpus))):
        room = Room(parts, seconds=config.placement.ready_seconds)
        try:
            trainers = RayTrainers(device, folder, config.threads, room)
            hosts = RayHosts(room, range(behind, len(parts)), tell)
            yield trainers, hosts, RayHosts(room, range(first, behind), tell_of_evaluation)
        finally:
            room.close()
