"""How many workers train and how many generate, in one number each, whatever a recipe calls them."""

from __future__ import annotations

from typing import Any

from sluice.config.rollout import RolloutConfig
from sluice.config.run import RunConfig
from sluice.errors import ConfigError


def sized(config: RunConfig, *, train: int | None, rollout: int | None) -> RunConfig:
    """The run with so many accelerators, or CPU workers where it has none, for training and for rollout.

    Args:
        train: ranks of the trainer; None leaves them. With `placement.colocate` also what engines have, unless
            `rollout` says less.
        rollout: accelerators of all engines together: their number is this by what one of them takes. Servers of the
            embedded engine take one.

    Raises:
        ConfigError: the number does not divide, or the recipe's engines cannot be counted so.
    """
    if train is None and rollout is None:
        return config
    changes: dict[str, Any] = config.model_dump()
    if train is not None:
        changes["train"]["ranks"] = train
    if config.placement.colocate:
        ranks = changes["train"]["ranks"]
        if rollout is not None and rollout > ranks:
            raise ConfigError(
                f"--rollout-gpus {rollout} with placement.colocate, where engines sit on the trainer's {ranks}",
                hint=f"--train-gpus {rollout}, or --no-colocate",
            )
        rollout = rollout if rollout is not None else ranks
    if rollout is not None:
        _size_engines(config.rollout, changes["rollout"], rollout)
    return RunConfig.model_validate(changes)


def _size_engines(rollout: RolloutConfig, changes: dict[str, Any], count: int) -> None:
    if rollout.engine == "embedded":
        changes["embedded"]["servers"] = count
        return
    groups = rollout.sglang.groups
    if rollout.engine != "sglang" or rollout.sglang.urls or len(groups) != 1 or groups[0].devices:
        raise ConfigError(
            "--rollout-gpus counts engines of one kind that the run starts and places, and this recipe has others",
            hint="set rollout.sglang.groups in the recipe",
        )
    size = groups[0].accelerators
    if count % size:
        raise ConfigError(
            f"--rollout-gpus {count}: one engine takes {size} (tp x pp x dp)", hint=f"a multiple of {size}"
        )
    changes["sglang"]["groups"][0]["engines"] = count // size
