"""Where a run's trainers and servers are: here, or on a cluster. Chosen in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sluice.config.run import RunConfig
from sluice.errors import ConfigError
from sluice.orchestrate.trainers import Trainers
from sluice.rollout.engines.sglang.hosting import Here, Hosts


@dataclass(frozen=True, slots=True)
class Placement:
    """What a run is given to build its parts with.

    Attributes:
        hosts: of the servers that the run trains with.
        measuring: of the evaluation's own servers.
    """

    trainers: Trainers
    hosts: Hosts
    measuring: Hosts


@contextmanager
def place(config: RunConfig, folder: Path, device: str, tell: Callable[[str], None]) -> Iterator[Placement]:
    """The placement that the recipe names, for the length of the block.

    Args:
        folder: of the run.
        device: resolved.
        tell: told in a line each where parts are.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not fit the recipe.
    """
    if config.placement.runtime == "inline":
        yield Placement(Trainers(device, folder, config.threads), Here(), Here())
        return
    try:
        from sluice.orchestrate.ray.placement import ray_placement
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            "placement.runtime = 'ray', and Ray is not installed", hint="pip install 'ray>=2.50'"
        ) from error
    with ray_placement(config, folder, device, tell) as placed:
        yield Placement(*placed)
