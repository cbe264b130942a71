"""Anthropic's messages: an answer as a message or as the events that build it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from sluice.rollout.chat.base import Delta, ToolCall
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.gateway.anthropic import MessagesRequest
from sluice.rollout.gateway.content import stops
from sluice.rollout.gateway.stream import Choices, Stream, event
from sluice.rollout.session import Choice


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
