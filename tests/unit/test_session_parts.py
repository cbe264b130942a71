"""Parts of a session: when messages are the same, where text is cut, and what a session weighs."""

from __future__ import annotations

import asyncio
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from session_rig import CHAT, USER, Script, make, one, said

from sluice.rollout.chat.base import ChatMessage, ToolCall
from sluice.rollout.session import Session
from sluice.rollout.session.history import canonical, prints
from sluice.rollout.session.reader import PlainParser, StopCut, cut


def same(recorded: ChatMessage, sent: ChatMessage) -> bool:
    (one,), (other,) = prints((recorded,)), prints((sent,))
    assert one.same(other) == (not one.difference(other))
    return one.same(other)


def call(arguments: str, id: str = "c1", name: str = "f") -> ChatMessage:
    return ChatMessage("assistant", tool_calls=(ToolCall(id, name, arguments),))


@pytest.mark.parametrize(
    ("recorded", "sent"),
    [
        (ChatMessage("assistant", "a \n"), ChatMessage("assistant", "a")),
        (ChatMessage("assistant", "a", reasoning="r"), ChatMessage("assistant", "a")),
        (ChatMessage("assistant", "a", reasoning="r\n"), ChatMessage("assistant", "a", reasoning="r")),
        (call('{"b": 1.0, "a": "\\u00e9"}'), call('{"a":"é","b":1}', id="toolu_9")),
        (call('{"n": 12345678901234567890}'), call('{"n": 12345678901234567000}')),
        (call('{"n": -0.0}'), call('{"n": 0}')),
        (call(""), call("{}")),
        (call("not json"), call(" not json")),
        (ChatMessage("tool", "x", name="f"), ChatMessage("tool", "x")),
    ],
)
def test_what_clients_change_is_the_same(recorded: ChatMessage, sent: ChatMessage) -> None:
    assert same(recorded, sent)


@pytest.mark.parametrize(
    ("recorded", "sent"),
    [
        (ChatMessage("user", "a "), ChatMessage("user", "a")),
        (ChatMessage("tool", "x\n"), ChatMessage("tool", "x")),
        (ChatMessage("user", "a"), ChatMessage("system", "a")),
        (ChatMessage("assistant", "a b"), ChatMessage("assistant", "a  b")),
        (ChatMessage("assistant", "a", reasoning="r"), ChatMessage("assistant", "a", reasoning="other")),
        (call('{"a": 1}'), call('{"a": true}')),
        (call('{"a": 1}'), call('{"a": "1"}')),
        (call('{"a": [1, 2]}'), call('{"a": [2, 1]}')),
        (call("{}"), call("{}", name="g")),
        (call("{}"), ChatMessage("assistant")),
        (ChatMessage("tool", "x", name="f"), ChatMessage("tool", "x", name="g")),
    ],
)
def test_everything_else_differs(recorded: ChatMessage, sent: ChatMessage) -> None:
    assert not same(recorded, sent)


def test_results_that_change_places_differ_whatever_the_calls_are_named() -> None:
    def history(ids: tuple[str, str], first: int) -> tuple[ChatMessage, ...]:
        calls = tuple(ToolCall(id, "f", "{}") for id in ids)
        return ChatMessage("assistant", tool_calls=calls), ChatMessage("tool", "x", tool_call_id=ids[first])

    recorded = prints(history(("a", "b"), 0))[1]
    assert recorded.same(prints(history(("x", "y"), 0))[1])
    assert not recorded.same(prints(history(("x", "y"), 1))[1])


def test_canonical_takes_any_text() -> None:
    for text in ("[" * 100_000, '{"a": NaN}', "\ud800", "{", '{"a": 1' + "0" * 400 + "}", '{"a": 1' + "0" * 5000 + "}"):
        assert isinstance(canonical(text), str)


@given(
    text=st.text("abc", max_size=20),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=5),
)
def test_a_cut_does_not_depend_on_the_pieces(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(at, len(text)) for at in cuts)})
    cutter = StopCut(stop)
    shown = "".join(cutter.feed(text[a:b]) for a, b in pairwise(edges)) + cutter.release()
    ends = [text.find(one) + len(one) for one in stop if one in text]
    expected = (
        text
        if not ends
        else text[: min(text.find(s) for s in stop if s in text and text.find(s) + len(s) == min(ends))]
    )
    assert shown == expected == cut(text, stop)


@given(text=st.text(max_size=30), step=st.integers(1, 4))
def test_plain_text_in_pieces_is_the_decoded_whole(text: str, step: int) -> None:
    ids = CHAT.encode(text).tolist()
    parser = PlainParser(CHAT.text)
    deltas = [delta for at in range(0, len(ids), step) for delta in parser.feed(ids[at : at + step])]
    rest, parsed = parser.close()
    assert "".join(delta.text for delta in [*deltas, *rest]) == parsed.content == CHAT.text(ids)


def test_a_token_weighs_a_few_bytes_and_no_more_in_a_long_session() -> None:
    words = CHAT.encode("some words that are said again and again ").tolist()

    async def talk(session: Session, turns: int, tokens: int) -> None:
        history = [USER]
        for _ in range(turns):
            choice = await one(session, *history)
            history += [said(choice), USER]

    def weight(sessions: int, turns: int, tokens: int) -> float:
        """Bytes per sampled token of sessions that are all open at once."""
        answer = (words * tokens)[:tokens]

        async def main() -> list[Session]:
            opened: list[Session] = []
            for _ in range(sessions):
                engine = Script(lambda _: answer)
                opened.append(make(engine))
                await talk(opened[-1], turns, tokens)
                engine.requests.clear()
                engine.answers.clear()
            return opened

        tracemalloc.start()
        try:
            opened = asyncio.run(main())
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert all(session.counters()["sampled_tokens"] == turns * tokens for session in opened)
        return held / (sessions * turns * tokens)

    few, many = weight(50, 2, 1_000), weight(50, 8, 1_000)
    assert many < 24
    assert many < 1.2 * few
    assert np.isfinite(few)
