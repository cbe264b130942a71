"""Does a chat template leave the past alone, and does extension write what the template would?

A scripted conversation is played: questions, reasoning, two calls at once with their results, empty thinking. After
each answer the template renders the whole conversation anew, and two things are compared:

* the past: what stood there before must still stand there, to the letter. Many templates fail this, because they
  drop earlier reasoning. That is no fault: a session never renders its past again. It says that an agent which does
  would see another conversation than the model did.
* the continuation: what `extend` appends must be what the template itself puts after that answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice.errors import DataError
from sluice.rollout.chat.base import ChatMessage, ToolCall, ToolSpec

if TYPE_CHECKING:
    from sluice.rollout.chat.renderer import ChatRenderer
    from sluice.rollout.chat.template import Template

_TOOL: ToolSpec = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_SHOWN = 24
"""Characters around a difference that are printed."""


@dataclass(frozen=True, slots=True)
class Stability:
    """What `ChatRenderer.check` found. `str` is for people.

    Attributes:
        format: name of the format in use.
        turns: answers that were played.
        calls: tool calls in one answer; 0: the template takes none.
        thinks: reasoning was among what was played.
        template_stable: the template renders the past as it was.
        rewrites: what it changes, and where.
        extension_ok: every continuation equals the template's own, token by token.
        differences: where one does not.
        boundary: continuations begin at a special token, so no text merges over the border of two turns.
    """

    format: str
    turns: int
    calls: int
    thinks: bool
    template_stable: bool
    rewrites: tuple[str, ...]
    extension_ok: bool
    differences: tuple[str, ...]
    boundary: bool

    def __str__(self) -> str:
        calls = {0: "no tools (the template takes none)", 1: "one tool call a turn (it takes no more)"}
        played = [f"{self.turns} turns", calls.get(self.calls, "parallel tool calls")]
        played += ["reasoning and empty thinking"] * self.thinks
        lines = [f"chat format {self.format}, tried over {', '.join(played)}"]
        if self.template_stable:
            lines.append("  the template leaves earlier turns alone")
        for rewrite in self.rewrites:
            lines.append(f"  the template {rewrite}")
        if self.rewrites:
            lines.append("  so sessions continue by token extension, never by rendering the past again")
        for difference in self.differences:
            lines.append(f"  a continuation differs from the template's own, {difference}")
        if not self.boundary:
            lines.append("  no special token ends a turn: new text is tokenised apart from it")
        return "\n".join(lines)


def examine(renderer: ChatRenderer, template: Template, turns: int, *, thinks: bool) -> Stability:
    """Play `turns` answers, `thinks` with reasoning in them. See the module for what is compared."""
    calls = 2 if template.takes_calls or template.offer else 0
    try:
        return _play(renderer, template, turns, calls, thinks)
    except DataError:
        if not calls:
            raise
    return _play(renderer, template, turns, 1, thinks)  # some templates refuse two calls at once


def _play(renderer: ChatRenderer, template: Template, turns: int, calls: int, thinks: bool) -> Stability:
    tools = (_TOOL,) if template.takes_tools or template.offer else ()
    history: list[ChatMessage] = []
    rewrites: dict[str, str] = {}
    differences: list[str] = []
    boundary = True
    answer = ChatMessage("assistant")
    for turn in range(turns):
        history += _news(turn, answer)
        answer = _answer(turn, calls, thinks)
        news = _news(turn + 1, answer)
        before = template.render(history, tools)
        alone = template.render([*history, answer], tools, prompt=False)
        whole = template.render([*history, answer, *news], tools)
        kept, sampled = _split(before, alone, renderer)
        if not alone.startswith(before):
            rewrites.setdefault("opening", f"prints an answer's opening otherwise ({_parted(before, alone)})")
        if answer.reasoning and answer.reasoning not in alone:
            rewrites.setdefault("reasoning", "never prints an answer's reasoning")
        elif not whole.startswith(kept):
            kind, words = _rewrite(kept, whole, answer, turn)
            rewrites.setdefault(kind, words)
        try:
            ids = renderer.extend(renderer.encode(sampled), news, tools)
        except DataError as error:
            differences.append(f"turn {turn + 1}: {error}")
            break
        boundary = boundary and int(ids[0]) in renderer.eos
        if list(renderer.encode(whole)[-len(ids) :]) != list(ids):
            differences.append(f"turn {turn + 1}: {_before_common_end(whole, renderer.whole_text(ids))}")
        history.append(answer)
    return Stability(
        format=renderer.format,
        turns=turns,
        calls=calls,
        thinks=thinks,
        template_stable=not rewrites,
        rewrites=tuple(rewrites.values()),
        extension_ok=not differences,
        differences=tuple(differences),
        boundary=boundary,
    )


def _news(turn: int, answer: ChatMessage) -> list[ChatMessage]:
    """What comes before answer `turn`: results of the calls in the answer before it, or a question."""
    if not answer.tool_calls:
        return [ChatMessage("user", f"Question {turn}?")]
    return [
        ChatMessage("tool", f"result {call.id}", tool_call_id=call.id, name=call.name) for call in answer.tool_calls
    ]


def _answer(turn: int, calls: int, thinks: bool) -> ChatMessage:
    """Of four answers the first and the last call tools, the third has empty thinking."""
    reasoning = f"because{turn}" if thinks and turn % 4 != 2 else ""
    if not calls or turn % 4 in (1, 2):
        return ChatMessage("assistant", f"Answer {turn}.", reasoning)
    made = tuple(ToolCall(f"call{turn:04d}{n}", "lookup", f'{{"word": "w{n}"}}') for n in range(calls))
    return ChatMessage("assistant", f"Looking {turn}." if turn % 4 else "", reasoning, made)


def _split(before: str, alone: str, renderer: ChatRenderer) -> tuple[str, str]:
    """`alone` up to the end of its last turn, and that turn as the model would have sampled it, end left out."""
    start = len(before) if alone.startswith(before) else max(alone.rfind(before[-_SHOWN:]), 0)
    ends = [renderer.whole_text([id]) for id in renderer.eos]
    end = min((at for at in (alone.find(mark, start) for mark in ends) if at >= 0), default=len(alone))
    return alone[:end], alone[start:end]


def _rewrite(kept: str, whole: str, answer: ChatMessage, turn: int) -> tuple[str, str]:
    """The kind of change, and what is said about it."""
    if answer.reasoning and answer.reasoning not in whole:
        return "reasoning", f"drops earlier reasoning (that of turn {turn + 1} when turn {turn + 2} is asked)"
    if not answer.reasoning and "think>" in _parted(kept, whole):
        return "empty", f"treats an empty think block otherwise when it is past (turn {turn + 1})"
    return f"turn {turn}", f"rewrites turn {turn + 1} ({_parted(kept, whole)})"


def _parted(one: str, other: str) -> str:
    """Where two texts part."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, at - _SHOWN // 2)
    return f"{one[start : at + _SHOWN]!r} becomes {other[start : at + _SHOWN]!r}"


def _before_common_end(own: str, ours: str) -> str:
    """What differs between the template's own text and a continuation that should be its end."""
    same = 0
    while same < min(len(own), len(ours)) and own[-1 - same] == ours[-1 - same]:
        same += 1
    if same == len(ours):
        return "the same text in other tokens"
    end = same - _SHOWN // 2
    tails = (text[: len(text) - max(end, 0)][-2 * _SHOWN :] for text in (own, ours))
    return "{!r} in the template, {!r} appended".format(*tails)
