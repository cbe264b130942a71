"""A sampled turn as it is drawn: token ids in, pieces of content and reasoning and whole tool calls out.

Text is told as soon as it cannot be the beginning of a mark. Nothing that was told is taken back, and how the ids
were cut into calls of `feed` changes nothing: the parser's state is a function of the text so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from sluice.rollout.chat.base import Delta, Parsed, ToolCall, ToolSpec
from sluice.rollout.chat.detokenise import Detokeniser
from sluice.rollout.chat.formats import Format, Written
from sluice.types import Ids

Opening: TypeAlias = Literal["", "open", "closed"]
"""What a prompt leaves an answer to begin with: reasoning it opened, reasoning it closed, or nothing."""

_SPACE = " \t\r\n"
_NEWLINE = "\r\n"


class TurnParser:
    """One turn. `feed` what was drawn as it is drawn, then `close`.

    Args:
        detokeniser: of this turn.
        format: the family's marks.
        tools: what the client offered; without tools the text of a call is content.
        call_id: names the calls of the turn, counted from 0.
        after: what the prompt's end is: it opened reasoning, it closed it, or neither.
    """

    def __init__(
        self,
        detokeniser: Detokeniser,
        format: Format,
        tools: Sequence[ToolSpec],
        call_id: Callable[[int], str],
        after: Opening = "",
    ) -> None:
        self._detokeniser = detokeniser
        self._format = format
        self._tools = tuple(tools)
        self._call_id = call_id
        self._mode: Literal["start", "reasoning", "content", "call"] = "reasoning" if after == "open" else "start"
        self._text = ""  # not yet told
        self._space = ""  # white space that is told unless a mark follows
        self._leading = bool(after)  # line breaks after a mark are dropped
        self._open = ""  # the mark that opened the call
        self._deltas: list[Delta] = []  # all that was told
        self._calls: list[ToolCall] = []
        self._malformed: list[str] = []
        self._resumed = False  # content goes on after a call

    def feed(self, ids: Sequence[int] | Ids) -> list[Delta]:
        """What these ids make certain."""
        return self._advance(self._detokeniser.feed(ids), final=False)

    def close(self) -> tuple[list[Delta], Parsed]:
        """The rest, and the turn as a whole."""
        deltas = self._advance(self._detokeniser.close(), final=True)
        return deltas, Parsed(
            "".join(delta.text for delta in self._deltas if delta.kind == "content"),
            "".join(delta.text for delta in self._deltas if delta.kind == "reasoning"),
            tuple(self._calls),
            tuple(self._malformed),
        )

    def _advance(self, text: str, *, final: bool) -> list[Delta]:
        told = len(self._deltas)
        if not text and not final:
            return []
        self._text += text
        while self._step(final):
            pass
        if final and self._space:
            self._tell(self._space)
        return self._deltas[told:]

    def _step(self, final: bool) -> bool:
        if self._mode == "content":
            return self._content(final)
        if self._mode == "reasoning":
            return self._reasoning(final)
        return self._call(final) if self._mode == "call" else self._start(final)

    # Each step returns True when it changed the mode and another step may follow.

    def _start(self, final: bool) -> bool:
        """Before anything but white space: reasoning or a bare call may begin."""
        ahead = self._text.lstrip(_SPACE)
        think = self._format.think
        if think and ahead.startswith(think[0]):
            self._text = ahead[len(think[0]) :]
            return self._enter("reasoning")
        bare = self._format.bare and bool(self._tools)
        if bare and ahead.startswith("{"):
            self._space, self._text, self._open, self._mode = self._text[: -len(ahead)], ahead, "", "call"
            return True
        undecided = (think is not None and think[0].startswith(ahead)) or (bare and not ahead)
        if undecided and not final:
            return False
        self._mode = "content"
        return True

    def _reasoning(self, final: bool) -> bool:
        mark = self._until((self._format.think or ("", ""))[1:], final)
        return bool(mark) and self._enter("content")

    def _content(self, final: bool) -> bool:
        mark = self._until((self._format.open, *self._format.silent) if self._tools else (), final)
        if mark and mark == self._format.open:
            self._open, self._mode = mark, "call"
            return True
        return bool(mark) and self._enter("content")

    def _call(self, final: bool) -> bool:
        close = self._format.close if self._open else ""
        at = self._text.find(close) if close else -1
        if at < 0 and not final:
            return False
        end = at + len(close) if at >= 0 else len(self._text)
        body, whole = self._text[: at if at >= 0 else end], self._open + self._text[:end]
        calls = None if close and at < 0 else self._format.read(body, self._tools)
        self._text = self._text[end:]
        if calls is None:
            if self._open or body.startswith('{"name"'):
                self._malformed.append(whole)
            self._mode = "content"
            self._say(whole)
            return True
        self._resumed = any(delta.kind == "content" for delta in self._deltas)
        for call in calls:
            self._add(call)
        return self._enter("content")

    # Text on its way out.

    def _enter(self, mode: Literal["reasoning", "content"]) -> bool:
        """Past a mark: white space before it and line breaks after it belong to it."""
        self._mode, self._space, self._leading = mode, "", True
        return True

    def _until(self, marks: Sequence[str], final: bool) -> str:
        """Tell what stands before the first of `marks` and drop it; without one, what can be part of none."""
        found = [(self._text.find(mark), -len(mark), mark) for mark in marks if mark and mark in self._text]
        if found:
            at, _, mark = min(found)
            before, self._text = self._text[:at], self._text[at + len(mark) :]
            self._say(before)
            return mark
        keep = 0 if final else max((_overlap(self._text, mark) for mark in marks if mark), default=0)
        ready = len(self._text) - keep
        before, self._text = self._text[:ready], self._text[ready:]
        self._say(before)
        return ""

    def _say(self, text: str) -> None:
        text = self._space + text
        if self._leading:
            text = text.lstrip(_NEWLINE)
            self._leading = not text
        body = text.rstrip(_SPACE)
        self._space = text[len(body) :]
        if body:
            self._tell(body)

    def _tell(self, text: str) -> None:
        kind = "reasoning" if self._mode == "reasoning" else "content"
        if self._resumed and kind == "content":
            self._resumed, text = False, "\n" + text
        self._deltas.append(Delta(kind, text))

    def _add(self, written: Written) -> None:
        call = ToolCall(self._call_id(len(self._calls)), written.name, written.arguments)
        self._calls.append(call)
        self._deltas.append(Delta("tool_call", call=call))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` and is not all of it."""
    tail = text[1 - len(mark) :] if len(mark) > 1 else ""
    at = tail.find(mark[0])
    while at >= 0:
        if mark.startswith(tail[at:]):
            return len(tail) - at
        at = tail.find(mark[0], at + 1)
    return 0
