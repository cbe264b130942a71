"""Runners whose agents come over HTTP, and the gateway that they come to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from sluice.config.rollout import RolloutConfig
from sluice.config.runners import CommandRunner, ExternalRunner, PythonRunner
from sluice.errors import ConfigError
from sluice.plugins import check_protocol, load_object, signature_problem
from sluice.rollout.gateway.desk import Desk
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.runners.base import Runner
from sluice.rollout.runners.command import CommandAgent
from sluice.rollout.runners.external import ExternalDesk
from sluice.rollout.runners.toolkit import Toolkit


async def open_agents(
    stack: AsyncExitStack, config: RolloutConfig, kit: Toolkit, tell: Callable[[str], None]
) -> tuple[Runner, Gateway]:
    """Start the gateway and make the runner; `stack` stops the gateway."""
    desk = None
    if isinstance(config.runner, ExternalRunner):
        desk = ExternalDesk(config.runner, retry_after=config.gateway.retry_after_seconds)
    gateway = await open_gateway(stack, config, kit, desk)
    tell(f"gateway at {gateway.url}")
    kit = replace(kit, gateway=gateway)
    match config.runner:
        case CommandRunner() as chosen:
            return CommandAgent(chosen, kit, gateway), gateway
        case PythonRunner() as chosen:
            return _own_runner(chosen, kit), gateway
        case _:
            assert desk is not None  # made for the only runner that is left
            desk.bind(kit, gateway)
            if gateway.owner.fresh:
                tell(f"owner's key, shown only here: {gateway.owner.fresh}")
            return desk, gateway


async def open_gateway(stack: AsyncExitStack, config: RolloutConfig, kit: Toolkit, desk: Desk | None) -> Gateway:
    """Start the gateway on the configured address; `stack` stops it."""
    gateway = Gateway(config.gateway, engine=kit.engine, chat=kit.chat, limits=kit.limits, desk=desk, routes=kit.routes)
    await gateway.start()
    stack.push_async_callback(gateway.stop)
    return gateway


def _own_runner(config: PythonRunner, kit: Toolkit) -> Runner:
    """A runner of the user's own."""
    made = load_object(config.path, expects="a runner class")
    if not callable(made):
        raise ConfigError(f"{config.path} is a {type(made).__name__}, not a runner class", hint="name a class")
    problem = signature_problem(made, 1, list(config.params))
    if problem:
        raise ConfigError(
            f"{config.path} cannot be made from a Toolkit and `params`: {problem}",
            hint="define it as `def __init__(self, kit, …)` with `params` as keyword arguments",
        )
    runner: Runner = made(kit, **config.params)  # pyright: ignore[reportAssignmentType] - checked in the next line
    check_protocol(runner, Runner, config.path)
    return runner
