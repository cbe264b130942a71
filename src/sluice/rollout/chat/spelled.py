"""Tools for chat templates that know none: the Hermes way, in words that any template carries.

Many small models have a template of roles and contents only. The tools then stand in the system message, calls in
the assistant's text and results in a user message, as NousResearch's Hermes and Qwen2.5 write them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from sluice.rollout.chat.base import ChatMessage, ToolCall, ToolSpec

_OFFER = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def spell(messages: Sequence[ChatMessage], tools: Sequence[ToolSpec]) -> list[ChatMessage]:
    """The same conversation without tool roles and calls."""
    spelled: list[ChatMessage] = []
    results: list[str] = []
    for message in messages:
        if message.role == "tool":
            results.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        _flush(results, spelled)
        if message.tool_calls:
            parts = [message.content, *map(_call, message.tool_calls)]
            message = replace(message, content="\n".join(part for part in parts if part), tool_calls=())
        spelled.append(message)
    _flush(results, spelled)
    if not tools:
        return spelled
    offer = _OFFER.format(tools="\n".join(json.dumps(dict(tool), ensure_ascii=False) for tool in tools))
    if spelled and spelled[0].role == "system":
        return [replace(spelled[0], content=f"{spelled[0].content}\n\n{offer}"), *spelled[1:]]
    return [ChatMessage("system", offer), *spelled]


def _flush(results: list[str], spelled: list[ChatMessage]) -> None:
    if results:
        spelled.append(ChatMessage("user", "\n".join(results)))
        results.clear()


def _call(call: ToolCall) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
