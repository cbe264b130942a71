"""OpenAI's chat completions: a request as an `Ask`, answers as a completion or its chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from sluice.rollout.chat.base import ChatMessage, ToolCall
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.gateway.body import Body
from sluice.rollout.gateway.content import (
    MOST_CHOICES,
    Content,
    Function,
    Sampling,
    Stop,
    Tokens,
    finish_of,
    offered,
    stops,
    text_of,
    tool_spec,
    usage_of,
)
from sluice.rollout.gateway.errors import BadRequest
from sluice.rollout.gateway.stream import Choices, Piece, Stream, event
from sluice.rollout.session import Ask, Choice


class CalledFunction(Body):
    """Name and arguments of a call."""

    name: str
    arguments: str = ""


class Call(Body):
    """A call in an assistant's message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessageIn(Body):
    """A message of the history. Older `function` messages are refused: their calls have no ids."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Tool(Body):
    """A tool; only functions."""

    type: Literal["function"]
    function: Function


class StreamOptions(Body):
    """What a stream ends with."""

    include_usage: bool | None = None


class ResponseFormat(Body):
    """The form of the answer; only text."""

    type: str = "text"


class ChatRequest(Sampling):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessageIn], Field(min_length=1)]
    model: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_ids: bool | None = None


def ask(body: ChatRequest) -> Ask:
    """The request as a session takes it. Raises BadRequest for what cannot be honoured."""
    if body.top_logprobs:
        raise BadRequest("top_logprobs: alternatives of a token are not recorded; only 0 is", param="top_logprobs")
    if body.response_format is not None and body.response_format.type != "text":
        raise BadRequest(
            f"response_format = {body.response_format.type[:40]!r}: the model is sampled as it is, only 'text' is",
            param="response_format",
        )
    tools = tuple(tool_spec(tool.function) for tool in body.tools or ())
    return Ask(
        messages=tuple(message(one, f"messages.{at}") for at, one in enumerate(body.messages)),
        tools=offered(tools, body.tool_choice),
        n=body.n or 1,
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        stop=stops(body.stop),
        wishes=body.wishes(),
        template_kwargs=body.chat_template_kwargs or {},
    )


def message(sent: ChatMessageIn, where: str) -> ChatMessage:
    """A message as the chat template takes it."""
    text = text_of(sent.content, where)
    match sent.role:
        case "function":
            raise BadRequest(
                f"{where}: messages of the role 'function' are from before tools", hint="use role 'tool'", param=where
            )
        case "system" | "developer":
            return ChatMessage("system", text)
        case "tool":
            return ChatMessage("tool", text, tool_call_id=sent.tool_call_id or "", name=sent.name or "")
        case "assistant":
            calls = tuple(
                ToolCall(call.id, call.function.name, call.function.arguments) for call in sent.tool_calls or ()
            )
            return ChatMessage("assistant", text, sent.reasoning_content or "", calls)
        case "user":
            return ChatMessage("user", text)


def call_of(call: ToolCall) -> dict[str, Any]:
    """A call as clients are shown it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def logprobs_of(choice: Choice, chat: ChatRenderer) -> dict[str, Any]:
    """Every token of the turn with its log-prob, those of calls and reasoning too."""
    assert choice.turn.logprobs is not None  # a sampled turn
    tokens: list[dict[str, Any]] = []
    for id, logprob in zip(choice.turn.ids, choice.turn.logprobs, strict=True):
        text = chat.whole_text([int(id)])
        tokens.append({"token": text, "logprob": float(logprob), "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": tokens, "refusal": None}


@dataclass(frozen=True, slots=True)
class Answering:
    """What all parts of one answer carry."""

    id: str
    model: str
    body: ChatRequest
    chat: ChatRenderer

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}

    def completion(self, choices: Choices) -> dict[str, Any]:
        """The whole answer."""
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_of(choices, self.chat),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        parsed = choice.parsed
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content or None, "refusal": None}
        if parsed.content == "" and not parsed.tool_calls:
            message["content"] = ""
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
        if parsed.tool_calls:
            message["tool_calls"] = [call_of(call) for call in parsed.tool_calls]
        shown: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "finish_reason": finish_of(choice),
            "logprobs": logprobs_of(choice, self.chat) if self.body.logprobs else None,
        }
        if self.body.return_token_ids:
            shown["token_ids"] = choice.turn.ids.tolist()
        return shown

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as it is drawn: role, pieces, the end of each choice, usage when asked for."""
        for index in range(self.body.n or 1):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        calls: dict[int, int] = {}
        async for pieces in stream.pieces():
            for piece in pieces:
                yield self._chunk(piece.choice, self._delta(piece, calls))
        choices = stream.choices()
        for choice in choices:
            extra: dict[str, Any] = {"finish_reason": finish_of(choice)}
            if self.body.logprobs:
                extra["logprobs"] = logprobs_of(choice, self.chat)
            if self.body.return_token_ids:
                extra["token_ids"] = choice.turn.ids.tolist()
            yield self._chunk(choice.index, {}, extra)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            usage = usage_of(choices, self.chat)
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        yield event("[DONE]")

    def _delta(self, piece: Piece, calls: dict[int, int]) -> dict[str, Any]:
        """One piece; `calls` counts the calls of each choice."""
        delta = piece.delta
        if delta.call is not None:
            at = calls.get(piece.choice, 0)
            calls[piece.choice] = at + 1
            return {"tool_calls": [{"index": at, **call_of(delta.call)}]}
        return {"reasoning_content" if delta.kind == "reasoning" else "content": delta.text}

    def _chunk(self, index: int, delta: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None, **(extra or {})}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})
