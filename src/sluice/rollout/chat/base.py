"""The words of a conversation, before they are tokens and after they were sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

ToolSpec: TypeAlias = Mapping[str, Any]
"""`{"type": "function", "function": {"name": …, "description": …, "parameters": <JSON schema>}}`."""

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as the model wrote it. `arguments` is JSON text; `id` is ours, unique in the session."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message. `reasoning` and `tool_calls` belong to the assistant, `tool_call_id` to a tool result."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A sampled turn as a message: what a client is shown, and what it sends back.

    Attributes:
        malformed: text that began like a tool call and is none; it is part of `content` too, word for word.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: tuple[str, ...] = ()


class Delta(NamedTuple):
    """A piece of a streamed turn: text of one kind, or one whole tool call."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    call: ToolCall | None = None
