"""From a recipe to a fleet: servers to start or to attach to, and the router before them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from sluice import device as devices
from sluice.config.rollout import RolloutConfig
from sluice.errors import ConfigError
from sluice.rollout.engines.sglang.elastic import Growth
from sluice.rollout.engines.sglang.engine import api_key
from sluice.rollout.engines.sglang.fleet import SGLangFleet
from sluice.rollout.engines.sglang.hosting import Here, Hosts
from sluice.rollout.engines.sglang.launch import Launcher, Spec, further, specs
from sluice.rollout.engines.sglang.member import Member, Running
from sluice.rollout.router import Router


def make_fleet(
    config: RolloutConfig,
    *,
    model: Path,
    folder: Path,
    device: str,
    progress: Callable[[str], None] | None = None,
    hosts: Hosts | None = None,
    shares: bool = False,
    spare: Sequence[str] | None = None,
) -> SGLangFleet:
    """The engine of `rollout.engine = "sglang"`. `start` starts or finds everything, `close` ends what it started.

    Args:
        config: of rollout.
        model: folder of the model that servers load; the weights of the run reach them later.
        folder: of the run; logs go to `folder/engines/NAME.log`.
        device: resolved device of the run; decides the build when the recipe does not.
        progress: told what starts, is lost and comes back, in a line each.
        hosts: where servers are started; None takes this host.
        shares: servers give their memory up while the trainer computes.
        spare: devices of servers beyond the recipe's, a set each; None when servers take none, or a cluster has them.

    Raises:
        ConfigError: the recipe's parts do not fit together.
    """
    logs = folder.absolute() / "engines"
    sglang = config.sglang
    build = devices.platform(device) if sglang.build == "auto" else sglang.build
    launcher = Launcher(sglang, model.absolute(), logs, build, config.context_length, progress, shares=shares)
    key = api_key(sglang)
    growth, where = None, hosts or Here()
    if sglang.urls:
        members = [_attached(url.rstrip("/"), config, key) for url in sglang.urls]
    else:
        members = [_started(spec, config, launcher, device, where) for spec in specs(sglang)]
        if not shares and sglang.uniform:
            growth = Growth(
                lambda number, on: _started(further(sglang, number, on), config, launcher, device, where),
                leader(config, members, launcher.python, logs, key), where, len(members), _listed(spare),
            )  # fmt: skip
    return SGLangFleet(
        members,
        sglang,
        config.router,
        spreader=spreader(config, members, launcher.python, logs, key),
        api_key=key,
        progress=progress,
        growth=growth,
    )


def _listed(spare: Sequence[str] | None) -> list[str] | None:
    return None if spare is None else list(spare)


def _started(spec: Spec, config: RolloutConfig, launcher: Launcher, device: str, hosts: Hosts) -> Member:
    bring: Callable[[], Awaitable[Running]] = partial(hosts.start, launcher, spec)
    group = spec.group
    shape = f"{group.tp} {group.dp} {group.ep} {group.pp} {group.args}"
    shared = launcher.build != "cpu" and devices.is_visible_to(device, launcher.environment(spec))
    return Member(
        spec.name,
        spec.role,
        shape,
        config.sglang,
        bring,
        owned=True,
        model=launcher.model,
        device=device if shared else "cpu",
        devices=spec.devices,
    )


def _attached(url: str, config: RolloutConfig, key: str) -> Member:
    async def found() -> Running:
        return Running(url)

    name = url.partition("://")[2]
    return Member(name, "regular", name, config.sglang, found, owned=False, api_key=key)


def spreader(
    config: RolloutConfig, members: Sequence[Member], python: Callable[[], Path], logs: Path, key: str
) -> Callable[[], Router] | None:
    """Makes the router, or None when requests go straight to the only server.

    Args:
        python: finds an interpreter that has `smg`, for a recipe that names none.
        logs: folder of the router's log.
        key: bearer token of the servers.

    Raises:
        ConfigError: there are several engines and no router is allowed.
    """
    make = leader(config, members, python, logs, key)
    if make is None and len(members) > 1:
        raise ConfigError(
            f"{len(members)} engines need a router, but rollout.router.use = 'never'",
            hint="set rollout.router.use = 'auto'",
        )
    if config.router.use == "auto" and len(members) == 1:
        return None
    return make


def leader(
    config: RolloutConfig, members: Sequence[Member], python: Callable[[], Path], logs: Path, key: str
) -> Callable[[], Router] | None:
    """Makes the router of several servers, see `spreader`; None when the recipe allows none."""
    if config.router.use == "never":
        return None
    pairs = any(member.role != "regular" for member in members)

    def make() -> Router:
        return Router(
            config.router, python=config.router.python or python(), log_path=logs / "router.log", pd=pairs, api_key=key
        )

    return make
