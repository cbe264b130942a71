"""Anthropic's messages: a request as an `Ask`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from sluice.rollout.chat.base import ChatMessage, ToolCall, ToolSpec
from sluice.rollout.gateway.body import Body
from sluice.rollout.gateway.content import Function, Number, Tokens, offered, stops, tool_spec
from sluice.rollout.gateway.errors import BadRequest
from sluice.rollout.session import Ask

_ERROR = "Error: "
"""Stands before the result of a tool that failed, unless the result says so itself."""


class Block(Body):
    """A content block: text, thinking, tool_use or tool_result; others are refused or carry nothing."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: Any = None
    is_error: bool | None = None


class MessageIn(Body):
    """A message of the history."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolIn(Body):
    """A tool: a name and the JSON schema of its input."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class Thinking(Body):
    """Whether the model is to think first: passed to the chat template as `enable_thinking`."""

    type: str


class CountRequest(Body):
    """Body of `POST /v1/messages/count_tokens`."""

    messages: Annotated[list[MessageIn], Field(min_length=1)]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[ToolIn] | None = None
    tool_choice: Any = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: Tokens
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Number | None = None


def ask(body: MessagesRequest) -> Ask:
    """The request as a session takes it. Raises BadRequest for what cannot be honoured."""
    named = ("temperature", "top_p", "top_k")
    return Ask(
        messages=messages(body),
        tools=tools(body),
        max_new_tokens=body.max_tokens,
        stop=stops(body.stop_sequences),
        wishes={name: float(value) for name in named if (value := getattr(body, name)) is not None},
        template_kwargs=template_kwargs(body),
    )


def template_kwargs(body: CountRequest) -> dict[str, Any]:
    """What `thinking` says to the chat template; nothing when it leaves the choice to the model."""
    kind = body.thinking.type if body.thinking else ""
    return {"enable_thinking": kind == "enabled"} if kind in ("enabled", "disabled") else {}


def tools(body: CountRequest) -> tuple[ToolSpec, ...]:
    """The tools that the model is told of."""
    made = (
        Function(name=one.name, description=one.description, parameters=one.input_schema) for one in body.tools or ()
    )
    return offered(tuple(tool_spec(function) for function in made), body.tool_choice)


def messages(body: CountRequest) -> tuple[ChatMessage, ...]:
    """The history. A user message with several tool results becomes one message for each."""
    found: list[ChatMessage] = []
    if body.system:
        found.append(ChatMessage("system", _plain(body.system, "system")))
    names: dict[str, str] = {}
    for at, sent in enumerate(body.messages):
        where = f"messages.{at}"
        if sent.role == "assistant":
            answer = _assistant(sent.content, where)
            names |= {call.id: call.name for call in answer.tool_calls}
            found.append(answer)
        elif sent.role == "system":
            found.append(ChatMessage("system", _plain(sent.content, where)))
        else:
            found += _user(sent.content, names, where)
    return tuple(found)


def _plain(content: str | Sequence[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for at, block in enumerate(content):
        if block.type != "text":
            raise BadRequest(f"{where}.{at}: a block of the type {block.type[:40]!r}; only text is taken", param=where)
    return "\n\n".join(block.text or "" for block in content) if where == "system" else _joined(content)


def _joined(content: Sequence[Block]) -> str:
    return "".join(block.text or "" for block in content)


def _assistant(content: str | Sequence[Block], where: str) -> ChatMessage:
    if isinstance(content, str):
        return ChatMessage("assistant", content)
    text, reasoning, calls = "", "", list[ToolCall]()
    for at, block in enumerate(content):
        match block.type:
            case "text":
                text += block.text or ""
            case "thinking":
                reasoning += block.thinking or ""
            case "redacted_thinking":
                continue
            case "tool_use":
                arguments = json.dumps({} if block.input is None else block.input, ensure_ascii=False)
                calls.append(ToolCall(block.id or "", block.name or "", arguments))
            case _:
                raise BadRequest(
                    f"{where}.content.{at}: a block of the type {block.type[:40]!r} in an answer", param=where
                )
    return ChatMessage("assistant", text, reasoning, tuple(calls))


def _user(content: str | Sequence[Block], names: dict[str, str], where: str) -> list[ChatMessage]:
    if isinstance(content, str):
        return [ChatMessage("user", content)]
    found: list[ChatMessage] = []
    for at, block in enumerate(content):
        here = f"{where}.content.{at}"
        if block.type == "text":
            if found and found[-1].role == "user":
                found[-1] = ChatMessage("user", found[-1].content + (block.text or ""))
            else:
                found.append(ChatMessage("user", block.text or ""))
        elif block.type == "tool_result":
            id = block.tool_use_id or ""
            found.append(ChatMessage("tool", _result(block, here), tool_call_id=id, name=names.get(id, "")))
        else:
            raise BadRequest(
                f"{here}: a block of the type {block.type[:40]!r}; only text and results are taken", param=here
            )
    return found


def _result(block: Block, where: str) -> str:
    if block.content is None or isinstance(block.content, str):
        text = block.content or ""
    elif isinstance(block.content, list):
        text = _plain([Block.model_validate(one) for one in block.content if _is_block(one, where)], where)
    else:
        raise BadRequest(f"{where}: the content of a result is text or a list of blocks", param=where)
    failed = block.is_error and not text.lower().startswith("error")
    return _ERROR + text if failed else text


def _is_block(value: Any, where: str) -> bool:
    if isinstance(value, dict) and isinstance(value.get("type"), str) and isinstance(value.get("text", ""), str):
        return True
    raise BadRequest(f"{where}: the content of a result holds something that is no text block", param=where)
