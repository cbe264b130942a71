"""Anthropic's messages: a request as an `Ask`, an answer as a message or its events."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from sluice.rollout.chat.base import ChatMessage, Delta, ToolCall, ToolSpec
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.gateway.body import Body
from sluice.rollout.gateway.content import Function, Number, Tokens, offered, stops, tool_spec
from sluice.rollout.gateway.errors import BadRequest
from sluice.rollout.gateway.stream import Choices, Stream, event
from sluice.rollout.session import Ask, Choice

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


def signature(thinking: str) -> str:
    """What clients want beside thinking. It is not looked at when it comes back: the thinking itself is compared."""
    return "sluice-" + hashlib.sha256(thinking.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Messaging:
    """What all parts of one answer carry."""

    id: str
    model: str
    body: MessagesRequest
    chat: ChatRenderer

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: Any
    ) -> dict[str, Any]:
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": reason, "stop_sequence": stop, "usage": usage,
        }  # fmt: skip

    def whole(self, choices: Choices) -> dict[str, Any]:
        """The whole answer."""
        choice = choices[0]
        parsed, content = choice.parsed, list[dict[str, Any]]()
        if parsed.reasoning:
            sign = signature(parsed.reasoning)
            content.append({"type": "thinking", "thinking": parsed.reasoning, "signature": sign})
        if parsed.content.strip() or not (parsed.tool_calls or parsed.reasoning):
            content.append({"type": "text", "text": parsed.content})
        content += [
            {"type": "tool_use", "id": one.id, "name": one.name, "input": _input(one)} for one in parsed.tool_calls
        ]
        reason, stop = self._stop(choice)
        return self._message(content, reason, stop, usage_of(choice))

    def _stop(self, choice: Choice) -> tuple[str, str | None]:
        """Stop reason, and the stop sequence that was hit."""
        if choice.turn.finish == "length":
            return "max_tokens", None
        if choice.parsed.tool_calls:
            return "tool_use", None
        text = self.chat.text(choice.turn.ids)
        hits = [(text.find(one) + len(one), one) for one in stops(self.body.stop_sequences) if one in text]
        return ("stop_sequence", min(hits)[1]) if hits else ("end_turn", None)

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as it is drawn."""
        nothing = {"input_tokens": 0, "output_tokens": 0}
        yield _event({"type": "message_start", "message": self._message([], None, None, nothing)})
        yield _event({"type": "ping"})
        blocks = _Blocks()
        async for pieces in stream.pieces():
            for piece in pieces:
                for data in blocks.add(piece.delta):
                    yield _event(data)
        choice = stream.choices()[0]
        for data in blocks.close():
            yield _event(data)
        reason, stop = self._stop(choice)
        ended = {"stop_reason": reason, "stop_sequence": stop}
        yield _event({"type": "message_delta", "delta": ended, "usage": usage_of(choice)})
        yield _event({"type": "message_stop"})


class _Blocks:
    """Content blocks of a stream: each is opened, filled and closed before the next one."""

    def __init__(self) -> None:
        self._at = 0
        self._kind = ""
        self._thinking = ""
        self._held = ""  # white space that may turn out to stand before a call

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """The events of one piece."""
        if delta.call is not None:
            self._held = ""
            return [*self._shut(), *self._call(delta.call)]
        text = delta.text
        if delta.kind == "content":
            text = self._held + text
            self._held = ""
            if self._kind != "text" and not text.strip():
                self._held = text
                return []
        found: list[dict[str, Any]] = []
        kind = "thinking" if delta.kind == "reasoning" else "text"
        if self._kind != kind:
            empty = {"thinking": "", "signature": ""} if kind == "thinking" else {"text": ""}
            found += [*self._shut(), self._start({"type": kind, **empty})]
            self._kind = kind
        if kind == "thinking":
            self._thinking += text
        return [*found, self._delta({"type": f"{kind}_delta", kind: text})]

    def _call(self, call: ToolCall) -> list[dict[str, Any]]:
        """A call comes whole: opened, filled and closed."""
        opened = self._start({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        self._kind = "tool_use"
        return [
            opened,
            self._delta({"type": "input_json_delta", "partial_json": call.arguments or "{}"}),
            *self._shut(),
        ]

    def _start(self, block: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_start", "index": self._at, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._at, "delta": delta}

    def _shut(self) -> list[dict[str, Any]]:
        """Close what is open."""
        if not self._kind:
            return []
        found: list[dict[str, Any]] = []
        if self._kind == "thinking":
            found.append(self._delta({"type": "signature_delta", "signature": signature(self._thinking)}))
            self._thinking = ""
        found.append({"type": "content_block_stop", "index": self._at})
        self._at += 1
        self._kind = ""
        return found

    def close(self) -> list[dict[str, Any]]:
        """The end; an answer without any block gets an empty one."""
        if self._at == 0 and not self._kind:
            self._kind = "text"
            return [self._start({"type": "text", "text": ""}), *self._shut()]
        return self._shut()


def _input(call: ToolCall) -> Any:
    return json.loads(call.arguments or "{}")


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


def usage_of(choice: Choice) -> dict[str, int]:
    """Anthropic's usage: `input_tokens` are those that were not read from the cache."""
    cached = min(choice.context_tokens, choice.cached_tokens)
    return {
        "input_tokens": choice.context_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": len(choice.turn),
    }
