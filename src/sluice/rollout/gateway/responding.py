"""OpenAI's responses: an answer as output items or as the events that build them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from sluice.rollout.chat.base import Delta, ToolCall
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.gateway.content import reasoning_tokens
from sluice.rollout.gateway.openai_responses import ResponsesRequest
from sluice.rollout.gateway.stream import Choices, Stream, event
from sluice.rollout.session import Choice


@dataclass(slots=True)
class Responding:
    """One answer.

    Attributes:
        id: of the response; ids of its items are made from it.
    """

    id: str
    model: str
    body: ResponsesRequest
    chat: ChatRenderer
    choice: Choice | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, status: str, output: list[dict[str, Any]], choice: Choice | None = None) -> dict[str, Any]:
        """The response object at some point of its life."""
        cut = choice is not None and choice.turn.finish == "length"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "incomplete" if cut else status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self.body.instructions,
            "metadata": self.body.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": self.body.previous_response_id,
            "temperature": self.body.temperature,
            "tool_choice": "none" if self.body.tool_choice == "none" else "auto",
            "tools": [],
            "top_p": self.body.top_p,
            "max_output_tokens": self.body.max_output_tokens,
            "usage": self._usage(choice) if choice is not None else None,
        }

    def _usage(self, choice: Choice) -> dict[str, Any]:
        context, sampled = choice.context_tokens, len(choice.turn)
        cached = min(context, choice.cached_tokens)
        return {
            "input_tokens": context,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": sampled,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens([choice], self.chat)},
            "total_tokens": context + sampled,
        }

    def whole(self, choices: Choices) -> dict[str, Any]:
        """The whole answer."""
        choice = choices[0]
        items = _Items(self.id)
        parsed = choice.parsed
        if parsed.reasoning:
            items.add(Delta("reasoning", parsed.reasoning))
        if parsed.content:
            items.add(Delta("content", parsed.content))
        for call in parsed.tool_calls:
            items.add(Delta("tool_call", call=call))
        items.close()
        return self.response("completed", items.done, choice)

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as it is drawn. `choice` is set before the last event."""
        number = 0

        def numbered(data: dict[str, Any]) -> bytes:
            nonlocal number
            number += 1
            return event({**data, "sequence_number": number - 1}, data["type"])

        yield numbered({"type": "response.created", "response": self.response("in_progress", [])})
        yield numbered({"type": "response.in_progress", "response": self.response("in_progress", [])})
        items = _Items(self.id)
        async for pieces in stream.pieces():
            for piece in pieces:
                for data in items.add(piece.delta):
                    yield numbered(data)
        choice = stream.choices()[0]
        for data in items.close():
            yield numbered(data)
        self.choice = choice
        final = self.response("completed", items.done, choice)
        yield numbered({"type": f"response.{final['status']}", "response": final})


class _Items:
    """Output items: each is added, filled and done before the next one.

    Attributes:
        done: finished items.
    """

    def __init__(self, id: str) -> None:
        self._id = id.removeprefix("resp_")
        self.done: list[dict[str, Any]] = []
        self._kind = ""
        self._text = ""
        self._held = ""  # white space that may turn out to stand before a call

    @property
    def _at(self) -> int:
        return len(self.done)

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """The events of one piece."""
        if delta.call is not None:
            self._held = ""
            return [*self._shut(), *self._call(delta.call)]
        kind = "reasoning" if delta.kind == "reasoning" else "message"
        text = delta.text
        if kind == "message":
            text, self._held = self._held + text, ""
            if self._kind != "message" and not text.strip():
                self._held = text
                return []
        found = [] if kind == self._kind else [*self._shut(), *self._begin(kind)]
        self._text += text
        name = "reasoning_text" if kind == "reasoning" else "output_text"
        extra = {"logprobs": []} if kind == "message" else {}
        return [*found, {"type": f"response.{name}.delta", **self._place(), "delta": text, **extra}]

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._id}_{self._at}"

    def _place(self) -> dict[str, Any]:
        prefix = "rs" if self._kind == "reasoning" else "msg"
        return {"item_id": self._item_id(prefix), "output_index": self._at, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _item(self, status: str) -> dict[str, Any]:
        content = [self._part()] if status == "completed" else []
        if self._kind == "reasoning":
            return {
                "id": self._item_id("rs"), "type": "reasoning", "summary": [], "content": content, "status": status
            }  # fmt: skip
        return {
            "id": self._item_id("msg"),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _begin(self, kind: str) -> list[dict[str, Any]]:
        self._kind, self._text = kind, ""
        added = {"type": "response.output_item.added", "output_index": self._at, "item": self._item("in_progress")}
        return [added, {"type": "response.content_part.added", **self._place(), "part": self._part()}]

    def _shut(self) -> list[dict[str, Any]]:
        return list(self._shutting()) if self._kind else []

    def _shutting(self) -> Iterator[dict[str, Any]]:
        name = "reasoning_text" if self._kind == "reasoning" else "output_text"
        extra = {"logprobs": []} if self._kind == "message" else {}
        yield {"type": f"response.{name}.done", **self._place(), "text": self._text, **extra}
        yield {"type": "response.content_part.done", **self._place(), "part": self._part()}
        item = self._item("completed")
        yield {"type": "response.output_item.done", "output_index": self._at, "item": item}
        self.done.append(item)
        self._kind, self._text = "", ""

    def _call(self, call: ToolCall) -> list[dict[str, Any]]:
        id, at = self._item_id("fc"), self._at
        item = {"id": id, "type": "function_call", "call_id": call.id, "name": call.name}
        done = {**item, "arguments": call.arguments, "status": "completed"}
        place = {"item_id": id, "output_index": at}
        self.done.append(done)
        return [
            {
                "type": "response.output_item.added",
                "output_index": at,
                "item": {**item, "arguments": "", "status": "in_progress"},
            },
            {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments},
            {
                "type": "response.function_call_arguments.done",
                **place,
                "arguments": call.arguments,
                "name": call.name,
            },
            {"type": "response.output_item.done", "output_index": at, "item": done},
        ]

    def close(self) -> list[dict[str, Any]]:
        """The end; an answer without any item gets an empty message."""
        if not self.done and not self._kind:
            return [*self._begin("message"), *self._shut()]
        return self._shut()
