"""What a runner is built with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.errors import DataError
from sluice.rollout.chat.base import ChatMessage, ToolSpec
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import Engine
from sluice.rollout.runners.base import EpisodeRequest
from sluice.rollout.session import Limits, Session
from sluice.types import Prompt

if TYPE_CHECKING:
    from sluice.rollout.gateway.server import Gateway


@dataclass(frozen=True, slots=True)
class Toolkit:
    """Everything of a run that a runner may use.

    Attributes:
        engine: serves the policy.
        chat: its chat template, tool calls and reasoning.
        limits: of every session.
        folder: the run folder.
        gateway: the server for agents; None when the runner needs none.
        routes: bring the experts that each position was routed to into the episodes.
        secrets: environment variables that no agent may see.
    """

    engine: Engine
    chat: ChatRenderer
    limits: Limits
    folder: Path
    gateway: Gateway | None = None
    routes: bool = False
    secrets: frozenset[str] = field(default_factory=frozenset[str])

    def session(self, request: EpisodeRequest) -> Session:
        """A session of the episode, in this process and without the gateway."""
        return Session(
            id=request.id,
            group_id=request.group_id,
            prompt=request.prompt,
            sampling=request.sampling,
            engine=self.engine,
            chat=self.chat,
            limits=self.limits,
            noise=request.noise,
            routes=self.routes,
        )

    def admit(self, prompt: Prompt, max_new_tokens: int, tools: Sequence[ToolSpec] = ()) -> None:
        """Raise DataError when prompt and tools fill the context."""
        length, limit = len(self.chat.begin(chat_messages(prompt), tools)), self.limits.context_length
        if length >= limit:
            with_tools = " with its tools" if tools else ""
            raise DataError(
                f"prompt {prompt.id} has {length} tokens{with_tools}; the context holds {limit} "
                f"with the answers (up to {max_new_tokens} tokens each)",
                hint="shorten or drop it, or raise rollout.context_length if the model and engine allow it",
            )


def chat_messages(prompt: Prompt) -> tuple[ChatMessage, ...]:
    """The prompt's messages. Raises DataError for a role that no conversation has."""
    roles = {"system", "user", "assistant"}
    for message in prompt.messages:
        if message.role not in roles:
            raise DataError(f"prompt {prompt.id} has a message of the role {message.role!r}", hint=f"one of {roles}")
    return tuple(ChatMessage(message.role, message.content) for message in prompt.messages)  # pyright: ignore[reportArgumentType]
