"""Tools for chat templates that know none: in words, which any template carries.

Many small models have a template of roles and contents only. There tools stand in the system message, calls in the
assistant's text and results in a user message, as NousResearch's Hermes and Qwen2.5 write them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from sluice.rollout.chat.base import ChatMessage, ToolCall, ToolSpec


def offered(messages: Sequence[ChatMessage], tools: Sequence[ToolSpec], offer: str) -> list[ChatMessage]:
    """The conversation with `offer` in its system message, `{tools}` replaced by the tools, one JSON line each."""
    words = offer.replace("{tools}", "\n".join(json.dumps(dict(tool), ensure_ascii=False) for tool in tools))
    if messages and messages[0].role == "system":
        return [replace(messages[0], content=f"{messages[0].content}\n\n{words}"), *messages[1:]]
    return [ChatMessage("system", words), *messages]


def spelled(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The conversation with calls and results as text. Results side by side are one message."""
    plain: list[ChatMessage] = []
    results: list[str] = []
    for message in messages:
        if message.role == "tool":
            results.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        _flush(results, plain)
        if message.tool_calls:
            parts = [message.content, *map(_call, message.tool_calls)]
            message = replace(message, content="\n".join(part for part in parts if part), tool_calls=())
        plain.append(message)
    _flush(results, plain)
    return plain


def _flush(results: list[str], plain: list[ChatMessage]) -> None:
    if results:
        plain.append(ChatMessage("user", "\n".join(results)))
        results.clear()


def _call(call: ToolCall) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
