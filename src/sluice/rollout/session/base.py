"""What a session is asked, what it answers, and what bounds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from sluice.config.gateway import OnDeviation
from sluice.rollout.chat.base import ChatMessage, Delta, Parsed, ToolSpec
from sluice.types import Turn

OnDelta: TypeAlias = Callable[[int, Sequence[Delta]], None]
"""Called with the index of a choice and the pieces that its newest tokens made certain."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a session; see `GatewayConfig` for each.

    Attributes:
        context_length: tokens of one segment, prompt and answers.
    """

    context_length: int
    max_turns: int = 512
    max_segments: int = 64
    on_mismatch: OnDeviation = "fork"
    on_branch: OnDeviation = "fork"
    on_root: OnDeviation = "fork"
    on_sampling: Literal["refuse", "flag"] = "refuse"


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat request: a whole history, to be answered.

    Attributes:
        n: answers wanted.
        max_new_tokens: the smaller of this and the session's own counts.
        stop: strings that end the answer besides the session's own. They and what follows are not shown.
        wishes: sampling parameters that the client named.
        template_kwargs: for the chat template, e.g. `enable_thinking`.
        on_delta: told the answers as they are drawn.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[ToolSpec, ...] = ()
    n: int = 1
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    wishes: Mapping[str, float] = field(default_factory=dict[str, float])
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    on_delta: OnDelta | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """One answer.

    Attributes:
        parsed: what the client is shown; a faithful client sends it back.
        text: the turn decoded, special tokens and what a client's stop string cut off left out.
        segment: index of the segment that owns it.
        context_tokens, cached_tokens: of its prompt; how many of them the engine did not compute again.
    """

    index: int
    parsed: Parsed
    turn: Turn
    text: str
    segment: int
    context_tokens: int
    cached_tokens: int
