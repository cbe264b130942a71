"""When a message that a client sends back is the one that was recorded.

Exact, except for what clients are known to change:

* Outer white space of an assistant's content: Anthropic's API refuses a final answer that ends in it, so its clients
  trim; a content of nothing else is sent as null or not at all beside tool calls (openai, Claude Code).
* An assistant's reasoning: most clients drop it (openai, litellm). It counts only when it is sent.
* Arguments of a call: clients that hold them as an object write them anew (Claude Code, every Anthropic client):
  other spacing, other escapes, sorted keys (Go), `1.0` as `1` and whole numbers beyond 2^53 rounded (JavaScript).
  Empty text is `{}`.
* Ids of calls: renamed to what a provider takes (litellm, LangChain). A tool's result counts as an answer to the
  call of the same place in its own history, whatever the call is named.
* Name of a tool in its result: optional everywhere, so it counts only when both have it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from sluice.rollout.chat.base import ChatMessage

_SHOWN = 30
"""Characters of either side's text in the description of a difference."""


class Call(NamedTuple):
    """A tool call as it is compared; `arguments` is canonical JSON, or the text when it is none."""

    name: str
    arguments: str


class Print(NamedTuple):
    """A message as it is compared.

    `answers` is the place of the call that a tool's result belongs to, -1 when its history does not tell.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    answers: int = -1
    name: str = ""

    def same(self, sent: Print) -> bool:
        """Whether `sent` is this message come back."""
        return not self._differing(sent)

    def _differing(self, sent: Print) -> str:
        if self.role != sent.role:
            return "role"
        if self.content != sent.content:
            return "content"
        if self.calls != sent.calls:
            return "tool calls"
        if sent.reasoning and self.reasoning != sent.reasoning:
            return "reasoning"
        if self.answers != sent.answers and self.answers >= 0 and sent.answers >= 0:
            return "tool_call_id"
        return "name" if self.name != sent.name and self.name and sent.name else ""

    def difference(self, sent: Print) -> str:
        """What differs, in words; empty when nothing does."""
        what = self._differing(sent)
        if what == "content":
            return f"content differs {_apart(self.content, sent.content)}"
        if what == "reasoning":
            return f"reasoning differs {_apart(self.reasoning, sent.reasoning)}"
        if what == "tool calls":
            return f"tool calls differ {_apart(_spelled(self.calls), _spelled(sent.calls))}"
        if what == "role":
            return f"role was {self.role}"
        return f"{what} differs" if what else ""


def prints(messages: Sequence[ChatMessage]) -> tuple[Print, ...]:
    """A history as it is compared."""
    found: list[Print] = []
    places: dict[str, int] = {}
    for message in messages:
        answers = -1
        content, reasoning = message.content, message.reasoning
        if message.role == "assistant":
            content, reasoning = content.strip(), reasoning.strip()
            if message.tool_calls:
                places = {call.id: place for place, call in enumerate(message.tool_calls) if call.id}
        elif message.role == "tool":
            answers = places.get(message.tool_call_id, -1)
        calls = tuple(Call(call.name, canonical(call.arguments)) for call in message.tool_calls)
        found.append(Print(message.role, content, reasoning, calls, answers, message.name))
    return tuple(found)


def agreement(recorded: Sequence[Print], sent: Sequence[Print]) -> int:
    """How many messages from the first on are the same."""
    for at, (one, other) in enumerate(zip(recorded, sent, strict=False)):
        if not one.same(other):
            return at
    return min(len(recorded), len(sent))


def canonical(arguments: str) -> str:
    """Equal for JSON texts of equal value; the text itself when it is no JSON."""
    if not arguments.strip():
        return "{}"
    try:
        return settled(json.loads(arguments))
    except (ValueError, RecursionError):
        return arguments.strip()


def settled(value: Any) -> str:
    """A JSON value as one text: keys sorted, numbers as doubles."""
    return json.dumps(_settle(value), sort_keys=True, separators=(",", ":"))


def _settle(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _settle(one) for key, one in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_settle(one) for one in cast(Sequence[Any], value)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value) + 0.0  # minus zero is zero
        except OverflowError:
            return value
    return value


def _spelled(calls: Sequence[Call]) -> str:
    return "; ".join(f"{call.name}({call.arguments})" for call in calls)


def _apart(recorded: str, sent: str) -> str:
    """Where two texts part, with a little of each."""
    pairs = enumerate(zip(recorded, sent, strict=False))
    at = next((n for n, (one, other) in pairs if one != other), min(len(recorded), len(sent)))
    return f"from character {at} on: was {recorded[at : at + _SHOWN]!r}, is {sent[at : at + _SHOWN]!r}"
