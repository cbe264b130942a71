"""What the APIs' translations have in common: text of parts, sampling wishes, usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from sluice.rollout.chat.base import ToolSpec
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.gateway.body import Body
from sluice.rollout.gateway.errors import BadRequest
from sluice.rollout.session import Choice

TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
MOST_CHOICES = 128

Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]


class Part(Body):
    """A part of a message's content; only text is taken."""

    type: str
    text: str | None = None


Content = str | list[Part] | None


class Sampling(Body):
    """Sampling parameters that a client may name. A session has its own; see `GatewayConfig.on_sampling`."""

    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Number | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None

    def wishes(self) -> dict[str, float]:
        """Those that were named. A logit bias is named by its number of entries: no session has one."""
        named = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        found = {name: float(value) for name in named if (value := getattr(self, name)) is not None}
        return {**found, **({"logit_bias": float(len(self.logit_bias))} if self.logit_bias else {})}


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


def tool_spec(function: Function) -> ToolSpec:
    """As the chat template takes it."""
    empty: dict[str, Any] = {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": empty if function.parameters is None else function.parameters,
        },
    }


def offered(tools: tuple[ToolSpec, ...], choice: Any) -> tuple[ToolSpec, ...]:
    """The tools that the model is told of under a `tool_choice`.

    Raises:
        BadRequest: a call is demanded. It could be had only by constrained decoding, and then the log-probs would
            belong to another distribution than the session's.
    """
    kind = cast("Mapping[str, Any]", choice).get("type") if isinstance(choice, dict) else choice
    if kind in (None, "auto"):
        return tools
    if kind == "none":
        return ()
    raise BadRequest(
        f"tool_choice = {str(kind)[:60]!r} cannot be kept: the model is sampled as it is, and nothing forces a call",
        hint="use 'auto' or 'none'",
        param="tool_choice",
    )


def text_of(content: Content, where: str) -> str:
    """The text of a message's content. Raises BadRequest for a part that is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part_text(part, f"{where}.content.{at}") for at, part in enumerate(content))


def part_text(part: Part, where: str) -> str:
    """The text of one part."""
    if part.type == "refusal":
        return ""
    if part.type not in TEXT_PARTS:
        raise BadRequest(f"{where}: a part of the type {part.type[:40]!r}; only text is taken", param=where)
    return part.text or ""


def stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings, empty ones left out."""
    listed = [stop] if isinstance(stop, str) else stop or []
    return tuple(text for text in listed if text)


Stop = str | Annotated[list[str], Field(max_length=16)] | None


def finish_of(choice: Choice) -> Literal["length", "tool_calls", "stop"]:
    """OpenAI's word for the end of an answer."""
    if choice.turn.finish == "length":
        return "length"
    return "tool_calls" if choice.parsed.tool_calls else "stop"


def usage_of(choices: Sequence[Choice], chat: ChatRenderer) -> dict[str, Any]:
    """OpenAI's usage. Reasoning tokens are counted by encoding the reasoning's text."""
    context = choices[0].context_tokens
    sampled = sum(len(choice.turn) for choice in choices)
    return {
        "prompt_tokens": context,
        "completion_tokens": sampled,
        "total_tokens": context + sampled,
        "prompt_tokens_details": {"cached_tokens": min(context, choices[0].cached_tokens)},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens(choices, chat)},
    }


def reasoning_tokens(choices: Sequence[Choice], chat: ChatRenderer) -> int:
    """See `usage_of`."""
    return sum(len(chat.encode(choice.parsed.reasoning)) for choice in choices if choice.parsed.reasoning)
