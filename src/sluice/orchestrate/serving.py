"""The rollout side of a run: engine, chat rendering, gateway and runner, opened in this order and closed in reverse."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.config.base import Part
from sluice.config.gateway import GatewayConfig
from sluice.config.rollout import RolloutConfig
from sluice.config.runners import SingleTurnRunner, ToolsRunner
from sluice.errors import CapabilityError
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import Capabilities, Engine
from sluice.rollout.runners.base import Runner
from sluice.rollout.runners.single import SingleTurn
from sluice.rollout.runners.toolkit import Toolkit
from sluice.rollout.runners.tools import ToolLoop
from sluice.rollout.session import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sluice.rollout.gateway.server import Gateway

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rollout:
    """What executes episodes."""

    runner: Runner
    chat: ChatRenderer
    gateway: Gateway | None


async def open_rollout(
    stack: AsyncExitStack,
    config: RolloutConfig,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    template_kwargs: dict[str, object],
    tell: Tell,
    beside: Sequence[Part] = (),
) -> Rollout:
    """Start the engine and what the recipe's runner needs around it; `stack` closes all of it again.

    Args:
        engine: not started yet.
        folder: the run folder.
        tell: shown to the person who watches: start-up, the chat template's stability, the gateway's address.
        beside: further parts of the recipe that name keys, which no agent's program may inherit.
    """
    context_length = await start_engine(stack, config, engine)
    chat = ChatRenderer(tokenizer, config.chat, template_kwargs)
    if isinstance(config.runner, SingleTurnRunner):
        runner = SingleTurn(engine, chat, context_length=context_length, routes=brings_routes(config))
        return Rollout(runner, chat, None)
    kit = make_kit(config, engine, chat, context_length, folder=folder, tell=tell, beside=beside)
    if isinstance(config.runner, ToolsRunner):
        return Rollout(ToolLoop(config.runner, kit), chat, None)
    from sluice.orchestrate.agents import open_agents  # a web server, only where agents come over HTTP

    runner, gateway = await open_agents(stack, config, kit, tell)
    return Rollout(runner, chat, gateway)


async def start_engine(stack: AsyncExitStack, config: RolloutConfig, engine: Engine) -> int:
    """Start an engine, which `stack` closes again. Returns the context length in tokens, see `check_capabilities`."""
    stack.push_async_callback(engine.close)
    return check_capabilities(config, await engine.start())


def make_kit(
    config: RolloutConfig,
    engine: Engine,
    chat: ChatRenderer,
    context_length: int,
    *,
    folder: Path,
    tell: Tell,
    beside: Sequence[Part] = (),
) -> Toolkit:
    """What sessions are made with, no gateway in it yet. Tells how stable the chat template is."""
    tell(str(chat.check()))
    limits = make_limits(config.gateway, context_length)
    return Toolkit(engine, chat, limits, folder, None, brings_routes(config), secrets(config, *beside))


def brings_routes(config: RolloutConfig) -> bool:
    """Whether episodes hold the experts that their positions were routed to."""
    return config.engine != "embedded" and config.sglang.routed_experts


def make_limits(config: GatewayConfig, context_length: int) -> Limits:
    """The limits of every session.

    Args:
        context_length: what engine and recipe allow, in tokens.

    Raises:
        CapabilityError: the recipe wants sessions longer than that.
    """
    wanted = config.context_tokens
    if wanted is not None and wanted > context_length:
        raise CapabilityError(
            f"rollout.gateway.context_tokens = {wanted}, but sequences hold {context_length} tokens",
            hint=f"set it to at most {context_length}, or leave it out",
        )
    return Limits(
        context_length=wanted or context_length,
        max_turns=config.max_turns,
        max_segments=config.max_segments,
        on_mismatch=config.on_mismatch,
        on_branch=config.on_branch,
        on_root=config.on_root,
        on_sampling=config.on_sampling,
    )


def secrets(*parts: Part) -> frozenset[str]:
    """Environment variables that hold keys of ours: those that a `…key_env` of these parts of the recipe names."""
    names: set[str] = set()
    for part in parts:
        for name in type(part).model_fields:
            value: object = getattr(part, name)
            if isinstance(value, Part):
                names |= secrets(value)
            elif name.endswith("key_env"):
                names.add(str(value))
    return frozenset(names - {""}) & os.environ.keys()


def check_capabilities(config: RolloutConfig, capabilities: Capabilities) -> int:
    """Refuse an engine that cannot do what the run needs. Returns the context length in tokens.

    Raises:
        CapabilityError: no log-probs, or a context shorter than asked for.
    """
    if not capabilities.logprobs:
        raise CapabilityError(
            f"{capabilities.name} ({capabilities.engine_version}) returns no log-probs",
            hint="behaviour log-probs must come from the engine; use SGLang, or rollout.engine=embedded",
        )
    wanted = config.context_length
    if wanted is not None and wanted > capabilities.context_length:
        raise CapabilityError(
            f"rollout.context_length = {wanted}, but {capabilities.name} holds {capabilities.context_length} tokens",
            hint=f"set rollout.context_length to at most {capabilities.context_length}, or raise the engine's limit",
        )
    return wanted or capabilities.context_length
