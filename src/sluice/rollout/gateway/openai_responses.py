"""OpenAI's responses: a request's items as an `Ask`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from sluice.rollout.chat.base import ChatMessage, ToolCall
from sluice.rollout.gateway.body import Body
from sluice.rollout.gateway.content import (
    Content,
    Function,
    Part,
    Sampling,
    Tokens,
    offered,
    part_text,
    text_of,
    tool_spec,
)
from sluice.rollout.gateway.errors import BadRequest
from sluice.rollout.session import Ask, Choice

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Item(Body):
    """An item of the input: a message, a call, a call's output, or reasoning."""

    type: str | None = None
    role: str | None = None
    content: Content = None
    summary: list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class ResponseTool(Body):
    """A tool; only functions, whose fields stand beside the type."""

    type: str
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ResponsesRequest(Sampling):
    """Body of `POST /v1/responses`."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Any = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    stream: bool | None = None
    text: dict[str, Any] | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    max_output_tokens: Tokens | None = None
    metadata: dict[str, str] | None = None


def ask(body: ResponsesRequest, history: Sequence[ChatMessage]) -> Ask:
    """The request as a session takes it.

    Args:
        history: what `previous_response_id` stands for.

    Raises:
        BadRequest: something cannot be honoured.
    """
    _check(body)
    tools = tuple(_tool(tool, f"tools.{at}") for at, tool in enumerate(body.tools or ()))
    begin = (ChatMessage("system", body.instructions),) if body.instructions else ()
    return Ask(
        messages=(*begin, *history, *messages(body)),
        tools=offered(tools, body.tool_choice),
        max_new_tokens=body.max_output_tokens,
        wishes=body.wishes(),
    )


def _check(body: ResponsesRequest) -> None:
    form = (body.text or {}).get("format")
    kind = form.get("type", "text") if isinstance(form, dict) else "text"
    refusals = {
        "background": (bool(body.background), "answers are not kept: ask with stream or wait"),
        "conversation": (body.conversation is not None, "send the items, or previous_response_id"),
        "top_logprobs": (bool(body.top_logprobs), "alternatives of a token are not recorded"),
        "text.format": (kind != "text", "the model is sampled as it is, only text is"),
    }
    for name, (asked, why) in refusals.items():
        if asked:
            raise BadRequest(f"{name}: {why}", param=name)


def _tool(tool: ResponseTool, where: str) -> Any:
    if tool.type != "function" or tool.name is None:
        raise BadRequest(f"{where}: a tool of the type {tool.type[:40]!r}; only named functions are", param=where)
    return tool_spec(Function(name=tool.name, description=tool.description, parameters=tool.parameters))


def messages(body: ResponsesRequest) -> tuple[ChatMessage, ...]:
    """The input's items as messages: reasoning, text and calls that follow each other are one answer."""
    if isinstance(body.input, str):
        return (ChatMessage("user", body.input),)
    gathered = _Gathering()
    for at, item in enumerate(body.input):
        gathered.add(item, f"input.{at}")
    found = gathered.end()
    if not found:
        raise BadRequest("the input is empty", param="input")
    return found


class _Gathering:
    """Items of one answer come one by one: reasoning first, then text, then calls."""

    def __init__(self) -> None:
        self._found: list[ChatMessage] = []
        self._names: dict[str, str] = {}
        self._reset()

    def _reset(self) -> None:
        self._open = False
        self._reasoning, self._text, self._calls = "", "", list[ToolCall]()

    def add(self, item: Item, where: str) -> None:
        match item.type or "message":
            case "message":
                role = _ROLES.get(item.role or "")
                if role is None:
                    raise BadRequest(f"{where}: a message of the role {str(item.role)[:40]!r}", param=where)
                text = text_of(item.content, where)
                if role == "assistant":
                    if self._calls:
                        self._flush()
                    self._open, self._text = True, self._text + text
                else:
                    self._flush()
                    self._found.append(ChatMessage("system" if role == "system" else "user", text))
            case "reasoning":
                if self._text or self._calls:
                    self._flush()
                parts = item.content if isinstance(item.content, list) else item.summary or []
                self._open = True
                self._reasoning += "".join(part.text or "" for part in parts)
            case "function_call":
                self._open = True
                self._names[item.call_id or ""] = item.name or ""
                self._calls.append(ToolCall(item.call_id or "", item.name or "", item.arguments or ""))
            case "function_call_output":
                self._flush()
                output = item.output
                text = output or "" if output is None or isinstance(output, str) else ""
                if isinstance(output, list):
                    text = "".join(part_text(part, f"{where}.output.{at}") for at, part in enumerate(output))
                id = item.call_id or ""
                self._found.append(ChatMessage("tool", text, tool_call_id=id, name=self._names.get(id, "")))
            case other:
                raise BadRequest(f"{where}: an item of the type {other[:40]!r} is not taken", param=where)

    def _flush(self) -> None:
        if self._open:
            self._found.append(ChatMessage("assistant", self._text, self._reasoning, tuple(self._calls)))
        self._reset()

    def end(self) -> tuple[ChatMessage, ...]:
        self._flush()
        return tuple(self._found)


def answered(choice: Choice) -> ChatMessage:
    """The answer as part of the next request's history."""
    parsed = choice.parsed
    return ChatMessage("assistant", parsed.content, parsed.reasoning, parsed.tool_calls)
