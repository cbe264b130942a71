"""Which accelerators of this host are whose: the trainer's ranks count from the run's device, engines come after them,
or, with `placement.colocate`, sit on the same ones."""

from __future__ import annotations

from collections.abc import Iterator

from sluice import device as devices
from sluice.config.rollout import RolloutConfig
from sluice.config.run import RunConfig
from sluice.config.sglang import EngineGroup
from sluice.errors import ConfigError


def assign(config: RunConfig, device: str) -> RolloutConfig:
    """The recipe's rollout, with `devices` named for every SGLang server that is started and that names none.

    Left as they are: servers on a CPU or of several hosts, and those of a run that has one accelerator for all: it is
    shared, at the same time or by turns, and nobody has to be told which.

    Args:
        device: resolved device of the run.

    Raises:
        ConfigError: there are too few accelerators.
    """
    rollout, visible = config.rollout, devices.visible(device)
    wanted = sum(group.accelerators * group.engines for group in rollout.sglang.groups)
    named = any(group.devices or group.nodes > 1 for group in rollout.sglang.groups)
    if rollout.engine != "sglang" or rollout.sglang.urls or named or len(visible) <= 1:
        return rollout
    first, ranks = devices.index(device), config.train.ranks
    pool = visible[first : first + ranks] if config.placement.colocate else visible[first + ranks :]
    if wanted > len(pool):
        whose = f"the trainer has {len(pool)}" if config.placement.colocate else f"{len(pool)} are left beside it"
        raise ConfigError(
            f"the engines ask for {wanted} accelerators; of {len(visible)} that are visible {whose}",
            hint="fewer engines (--rollout-gpus), other train.ranks (--train-gpus), or rollout.sglang.groups.devices "
            "to place them by hand",
        )
    left = iter(pool)
    groups = tuple(group.model_copy(update={"devices": tuple(_take(group, left))}) for group in rollout.sglang.groups)
    return rollout.model_copy(update={"sglang": rollout.sglang.model_copy(update={"groups": groups})})


def spare(config: RunConfig, device: str) -> list[str] | None:
    """Devices of further servers, a set each, as `devices` of a group names them.

    None where servers take none, or where a cluster places them. Empty where the recipe places its servers by hand,
    or where an accelerator is shared: there are never more servers than the recipe has.
    """
    rollout, visible = config.rollout, devices.visible(device)
    if device == "cpu" or config.placement.runtime == "ray":
        return None
    groups = rollout.sglang.groups
    named = any(group.devices or group.nodes > 1 for group in groups)
    if rollout.engine != "sglang" or config.placement.colocate or named or len(visible) <= 1:
        return []
    used = sum(group.accelerators * group.engines for group in groups)
    used += config.evaluation.servers * groups[0].accelerators
    left = iter(visible[devices.index(device) + config.train.ranks + used :])
    size = groups[0].accelerators
    return [",".join(each) for each in zip(*[left] * size, strict=False)]


def assign_evaluation(config: RunConfig, device: str) -> RolloutConfig:
    """The rollout of `evaluation.servers`: servers like the run's, on accelerators behind everybody else's.

    A cluster places them itself: nothing is named then.

    Args:
        device: resolved device of the run.

    Raises:
        ConfigError: there are too few accelerators.
    """
    rollout, count, visible = config.rollout, config.evaluation.servers, devices.visible(device)
    gateway = rollout.gateway.model_copy(update={"port": 0})  # the configured one is the run's
    if rollout.engine == "embedded":
        embedded = rollout.embedded.model_copy(update={"servers": count})
        return rollout.model_copy(update={"embedded": embedded, "gateway": gateway})
    each = rollout.sglang.groups[0]  # the only one, see `RunConfig`
    group = each.model_copy(update={"engines": count})
    if visible and config.placement.runtime == "inline":
        first = devices.index(device) + config.train.ranks
        left = visible[first + (0 if config.placement.colocate else each.accelerators * each.engines) :]
        if count * group.accelerators > len(left):
            raise ConfigError(
                f"evaluation.servers asks for {count * group.accelerators} accelerators of its own; of {len(visible)} "
                f"that are visible {len(left)} are left",
                hint="fewer engines or ranks, or evaluation.servers = 0: the run's engines answer beside their batches",
            )
        group = group.model_copy(update={"devices": tuple(_take(group, iter(left)))})
    sglang = rollout.sglang.model_copy(update={"groups": (group,)})
    return rollout.model_copy(update={"sglang": sglang, "gateway": gateway})


def _take(group: EngineGroup, left: Iterator[str]) -> Iterator[str]:
    for _ in range(group.engines):
        yield ",".join(next(left) for _ in range(group.accelerators))
