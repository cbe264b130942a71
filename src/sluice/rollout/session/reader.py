"""Sampled tokens as a client is shown them, while they are drawn and when they are all there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from sluice.rollout.chat.base import Delta, Parsed, ToolCall
from sluice.types import Ids

_INCOMPLETE = "\ufffd"
"""What a tokenizer prints for bytes that are not a whole character yet."""


class Parser(Protocol):
    """See `sluice.rollout.chat.parser.TurnParser`."""

    def feed(self, ids: Sequence[int]) -> list[Delta]: ...

    def close(self) -> tuple[list[Delta], Parsed]: ...


class PlainParser:
    """Text as it is: nothing is read out of it.

    Args:
        text: ids to text, special tokens left out.
    """

    def __init__(self, text: Callable[[Sequence[int]], str]) -> None:
        self._text = text
        self._ids: list[int] = []
        self._shown = self._read = 0  # the tokens between the two are decoded again with the new ones
        self._told = ""

    def feed(self, ids: Sequence[int]) -> list[Delta]:
        self._ids += [int(id) for id in ids]
        before = self._text(self._ids[self._shown : self._read])
        after = self._text(self._ids[self._shown :])
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return []
        self._shown, self._read = self._read, len(self._ids)
        return self._tell(after[len(before) :])

    def close(self) -> tuple[list[Delta], Parsed]:
        after = self._text(self._ids[self._shown :])
        deltas = self._tell(after[len(self._text(self._ids[self._shown : self._read])) :])
        return deltas, Parsed(self._told)

    def _tell(self, text: str) -> list[Delta]:
        self._told += text
        return [Delta("content", text)] if text else []


class StopCut:
    """Lets text through up to the first stop string, i.e. the one whose end comes first.

    What may be the beginning of one waits. How the text is cut into pieces changes nothing.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        if self.found:
            return ""
        self._held += text
        hits = [(self._held.find(stop) + len(stop), self._held.find(stop)) for stop in self._stop if stop in self._held]
        if hits:
            self.found = True
            return self._held[: min(hits)[1]]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return ready

    def release(self) -> str:
        """What waited: no stop string comes of it."""
        held, self._held = self._held, ""
        return "" if self.found else held


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    cutter = StopCut(stop)
    return cutter.feed(text) + cutter.release()


class Reader:
    """One answer: tokens in, what the client is shown out.

    Args:
        parser: of this turn.
        stop: the client's stop strings; they and what follows are not shown.
        tell: is given the pieces; None: nobody listens.
    """

    def __init__(
        self, parser: Parser, stop: Sequence[str] = (), tell: Callable[[Sequence[Delta]], None] | None = None
    ) -> None:
        self._parser = parser
        self._cuts: dict[Literal["reasoning", "content"], StopCut] = {
            "reasoning": StopCut(stop),
            "content": StopCut(stop),
        }
        self._tell = tell
        self._fed = 0
        self._told: list[Delta] = []

    def feed(self, ids: Sequence[int]) -> None:
        self._fed += len(ids)
        self._show(self._parser.feed(ids))

    def close(self, ids: Ids) -> Parsed:
        """The whole turn, all of whose ids these are."""
        if len(ids) > self._fed:
            self.feed(ids[self._fed :].tolist())
        deltas, parsed = self._parser.close()
        self._show(deltas)
        self._say(self._release())
        calls: tuple[ToolCall, ...] = tuple(delta.call for delta in self._told if delta.call is not None)
        return Parsed(self._said("content"), self._said("reasoning"), calls, parsed.malformed)

    def _said(self, kind: str) -> str:
        return "".join(delta.text for delta in self._told if delta.kind == kind)

    def _show(self, deltas: Sequence[Delta]) -> None:
        shown: list[Delta] = []
        for delta in deltas:
            if self._ended:
                break
            shown += self._release(but=delta.kind)
            if delta.kind == "tool_call":
                shown.append(delta)
            elif text := self._cuts[delta.kind].feed(delta.text):
                shown.append(Delta(delta.kind, text))
        self._say(shown)

    @property
    def _ended(self) -> bool:
        return any(cutter.found for cutter in self._cuts.values())

    def _release(self, but: str = "") -> list[Delta]:
        """What waited in case it became a stop string, and did not."""
        rest = [Delta(kind, self._cuts[kind].release()) for kind in self._cuts if kind != but]
        return [delta for delta in rest if delta.text]

    def _say(self, deltas: Sequence[Delta]) -> None:
        self._told += deltas
        if deltas and self._tell is not None:
            self._tell(deltas)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
