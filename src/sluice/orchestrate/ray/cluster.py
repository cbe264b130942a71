"""A Ray cluster: found or started, asked for room, left as it was found."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sluice import __version__
from sluice.config.placement import PlacementConfig
from sluice.errors import ConfigError
from sluice.orchestrate.ray import token

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0
"""Until a process of the cluster, which may have to be started, says what it is like."""


@contextmanager
def cluster(config: PlacementConfig, *, cpus: int) -> Iterator[None]:
    """Be connected to a cluster for the length of the block.

    A cluster that was found is left running, without what the run put there; one that was started here ends.

    Args:
        cpus: of a local cluster that is started: as many as the run's parts ask for.

    Raises:
        ConfigError: there is no such cluster, it has another version of Ray, Python or Sluice, it asks for no token
            while this process does, or this process is connected already.
    """
    if ray.is_initialized():
        raise ConfigError(
            "this process is connected to a Ray cluster already", hint="call ray.shutdown() before, or use the command"
        )
    address = str(config.address) or os.environ.get("RAY_ADDRESS", "")  # Ray takes no subclass of str
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "sluice"}
    if address:
        _refuse_if_nobody_listens(address)
        options["address"] = address
    else:
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    with token.as_it_was():
        _connect(options, address)
        try:
            if address:
                _refuse_another(address)
            yield
        finally:
            ray.shutdown()


def _connect(options: dict[str, Any], address: str) -> None:
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        if _wants_token(error):
            raise ConfigError(
                f"the Ray cluster at {address} wants a token, and this process shows none",
                hint="export RAY_AUTH_MODE=token, with the token in RAY_AUTH_TOKEN or ~/.ray/auth_token",
            ) from error
        if said and said[0].startswith("Version mismatch"):
            raise ConfigError(
                f"the Ray cluster at {address} is another Ray or Python than this process: {' '.join(said[1:])}",
                hint="install the cluster's versions here, or the other way round",
            ) from error
        raise ConfigError(
            f"no Ray cluster at {address or 'this host'}: {said[0] if said else type(error).__name__}",
            hint="start one with `ray start --head`, or leave placement.address empty: a local one is then started",
        ) from error


@ray.remote(num_cpus=0)
def _worker() -> tuple[bool, str]:
    """What a process of the cluster is like: whether it shows a token, and its Sluice."""
    from sluice import __version__ as version  # that process's: globals are sent along

    return token.asked(), version


def _refuse_another(address: str) -> None:
    """ConfigError when processes of the cluster could not work with this one."""
    try:
        shows, version = ray.get(_worker.remote(), timeout=ANSWER_SECONDS)
    except RayTaskError as error:
        raise ConfigError(
            f"processes of the Ray cluster at {address} cannot run Sluice: {str(error).strip().splitlines()[-1]}",
            hint="install sluice-rl[ray] on its nodes, of the same version as here",
        ) from error
    except GetTimeoutError as error:
        raise ConfigError(
            f"the Ray cluster at {address} ran nothing within {ANSWER_SECONDS:g} s",
            hint="see `ray status`: it may have no node that is alive",
        ) from error
    if token.asked() and not shows:
        raise ConfigError(
            f"the Ray cluster at {address} asks for no token, while this process does: it would turn the cluster away",
            hint="export RAY_AUTH_MODE=disabled, or start the cluster with RAY_AUTH_MODE=token",
        )
    if version != __version__:
        raise ConfigError(
            f"the Ray cluster at {address} has Sluice {version}, and this is {__version__}",
            hint="install the same version on its nodes",
        )


def _wants_token(error: BaseException | None) -> bool:
    """Whether a failed connection was one without the cluster's token: `ray start` asks for one by default."""
    while error is not None:
        if isinstance(error, AuthenticationError) or "InvalidAuthToken" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _refuse_if_nobody_listens(address: str) -> None:
    """ConfigError; Ray itself tries for minutes, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `auto`
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster at {address}: {error}",
            hint="start one with `ray start --head`, or leave placement.address empty: a local one is then started",
        ) from error


@dataclass(frozen=True, slots=True)
class Part:
    """Room for one actor.

    Attributes:
        cpus, accelerators: that it asks for.
        guest_of: number of the part whose room it shares by turns: it asks for none of its own. Hosts come first.
        share: of an accelerator that actor and guests of one room hold each, so that all are given the same one;
            0 where nobody shares.
    """

    cpus: float
    accelerators: int = 0
    guest_of: int | None = None
    share: float = 0.0

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": float(self.accelerators)} if self.accelerators else {})


class Room:
    """Room that was reserved for all parts of a run at once, so that no two runs hold half of what each needs.

    Args:
        parts: one for each actor, in the order in which `place` is asked.
        seconds: how long to wait for it.

    Raises:
        ConfigError: the cluster has less in all, or does not have it free in time.
    """

    def __init__(self, parts: Sequence[Part], *, seconds: float) -> None:
        self._parts = list(parts)
        self._further: dict[int, Any] = {}  # groups of parts that were asked for later
        hosts = [part for part in parts if part.guest_of is None]
        for kind, word in (("CPU", "CPU cores"), ("GPU", "accelerators")):
            wanted = sum(part.bundle.get(kind, 0.0) for part in hosts)
            there = float(ray.cluster_resources().get(kind, 0.0))
            if wanted > there:
                raise ConfigError(
                    f"the run asks for {wanted:g} {word}; the Ray cluster has {there:g}",
                    hint="lower train.ranks or the number of engines, or attach to a larger cluster",
                )
        self._group = placement_group([part.bundle for part in hosts], strategy="PACK")
        try:
            ray.get(self._group.ready(), timeout=seconds)
        except GetTimeoutError as error:
            free = ray.available_resources()
            self.close()
            raise ConfigError(
                f"the Ray cluster had no room within {seconds:g} s for {len(self._parts)} parts of {parts[0].bundle} "
                f"and like; free are {free.get('CPU', 0):g} CPU cores and {free.get('GPU', 0):g} accelerators",
                hint="somebody else uses the cluster; wait, or raise placement.ready_seconds",
            ) from error

    def another(self, like: int) -> int:
        """Ask for the room of one more part, like another one. Returns its number, for `ready` and `place`."""
        self._parts.append(self._parts[like])
        number = len(self._parts) - 1
        self._further[number] = placement_group([self._parts[like].bundle], strategy="PACK")
        return number

    async def ready(self, number: int) -> None:
        """Wait until a further part has its room, however long the cluster takes."""
        await self._further[number].ready()

    def give_back(self, number: int) -> None:
        """The room of a further part. That of the first parts is kept until `close`."""
        group = self._further.pop(number, None)
        if group is not None:
            remove_placement_group(group)

    def place(self, number: int) -> dict[str, Any]:
        """Options of the actor of part `number`."""
        part = self._parts[number]
        guest = part.guest_of is not None
        bundle = part.guest_of if part.guest_of is not None else number
        group = self._further.get(number)
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=group or self._group, placement_group_bundle_index=0 if group else bundle
        )
        own = {"num_cpus": 0.0 if guest else part.cpus, "num_gpus": part.share or (0 if guest else part.accelerators)}
        return {**own, "scheduling_strategy": strategy}

    def close(self) -> None:
        """Give it back."""
        for number in list(self._further):
            self.give_back(number)
        remove_placement_group(self._group)
