"""The gateway's translations, one API at a time, and the queue between a call and its client."""

from __future__ import annotations

from typing import Any

import pytest

from sluice.rollout.chat.base import ChatMessage, Delta, ToolCall
from sluice.rollout.gateway import anthropic, openai_chat, openai_responses
from sluice.rollout.gateway.body import parse
from sluice.rollout.gateway.book import Link
from sluice.rollout.gateway.errors import BadRequest
from sluice.rollout.gateway.keys import OwnerKey, digest, new_session_key, presented
from sluice.rollout.gateway.messaging import _Blocks
from sluice.rollout.gateway.problems import shaped
from sluice.rollout.gateway.responding import _Items
from sluice.rollout.gateway.stream import Feed, Piece

CALLS = (ToolCall("c1", "add", '{"a": 1}'), ToolCall("c2", "add", '{"a": 2}'))


def test_chat_messages() -> None:
    calls = [{"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in CALLS]
    body = openai_chat.ChatRequest.model_validate(
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": calls, "refusal": None},
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
            ],
            "stop": "x",
            "temperature": 1,
            "max_tokens": 9,
            "max_completion_tokens": 5,
            "seed": 3,
        }
    )
    ask = openai_chat.ask(body)
    assert ask.messages == (
        ChatMessage("system", "be kind"),
        ChatMessage("user", "q"),
        ChatMessage("assistant", "", "hm", CALLS),
        ChatMessage("tool", "1", tool_call_id="c1"),
    )
    assert (ask.stop, ask.wishes, ask.max_new_tokens, ask.n) == (("x",), {"temperature": 1.0}, 5, 1)


def test_anthropic_messages() -> None:
    blocks: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "hm", "signature": "anything"},
        {"type": "text", "text": "I add."},
        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "c2", "name": "add", "input": {"a": 2}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "1"}]},
        {"type": "tool_result", "tool_use_id": "c2", "content": "no number", "is_error": True},
        {"type": "text", "text": "go "},
        {"type": "text", "text": "on"},
    ]
    body = anthropic.MessagesRequest.model_validate(
        {
            "system": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": blocks},
                {"role": "user", "content": results},
            ],
            "max_tokens": 7,
            "thinking": {"type": "disabled"},
        }
    )
    ask = anthropic.ask(body)
    assert ask.messages == (
        ChatMessage("system", "one\n\ntwo"),
        ChatMessage("user", "q"),
        ChatMessage("assistant", "I add.", "hm", CALLS),
        ChatMessage("tool", "1", tool_call_id="c1", name="add"),
        ChatMessage("tool", "Error: no number", tool_call_id="c2", name="add"),
        ChatMessage("user", "go on"),
    )
    assert ask.template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image", "source": {}}],
        [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "image"}]}],
        [{"type": "tool_result", "tool_use_id": "c", "content": 5}],
        [{"type": "tool_result", "tool_use_id": "c", "content": ["x"]}],
    ],
)
def test_anthropic_refuses_what_is_no_text(content: Any) -> None:
    body = anthropic.CountRequest.model_validate({"messages": [{"role": "user", "content": content}]})
    with pytest.raises(BadRequest, match="content"):
        anthropic.messages(body)


def test_items_of_one_answer_are_one_message() -> None:
    call = {"type": "function_call", "name": "add"}
    body = openai_responses.ResponsesRequest.model_validate(
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I add."}]},
                {**call, "call_id": "c1", "arguments": '{"a": 1}'},
                {**call, "call_id": "c2", "arguments": '{"a": 2}'},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
                {"type": "message", "role": "assistant", "content": "= 3"},
            ],
            "instructions": "be kind",
        }
    )
    before = (ChatMessage("user", "earlier"),)
    assert openai_responses.ask(body, before).messages == (
        ChatMessage("system", "be kind"),
        *before,
        ChatMessage("user", "q"),
        ChatMessage("assistant", "I add.", "hm", CALLS),
        ChatMessage("tool", "1", tool_call_id="c1", name="add"),
        ChatMessage("tool", "2", tool_call_id="c2", name="add"),
        ChatMessage("assistant", "= 3"),
    )


def test_links_give_the_history_back() -> None:
    one, two, three = (ChatMessage("user", text) for text in "123")
    assert Link(Link(None, (one, two)), (three,)).history() == (one, two, three)


def test_anthropic_blocks_open_and_close_in_turn() -> None:
    blocks = _Blocks()
    events = [
        event
        for delta in (
            Delta("reasoning", "h"),
            Delta("reasoning", "m"),
            Delta("content", "\n\n"),  # white space before a call is no block
            Delta("tool_call", call=CALLS[0]),
            Delta("content", "\n"),
            Delta("content", "done"),
        )
        for event in blocks.add(delta)
    ]
    events += blocks.close()
    short = [(event["type"].removeprefix("content_block_"), event["index"]) for event in events]
    assert short == [
        ("start", 0), ("delta", 0), ("delta", 0), ("delta", 0), ("stop", 0),
        ("start", 1), ("delta", 1), ("stop", 1),
        ("start", 2), ("delta", 2), ("stop", 2),
    ]  # fmt: skip
    assert events[3]["delta"]["type"] == "signature_delta"
    assert events[6]["delta"] == {"type": "input_json_delta", "partial_json": '{"a": 1}'}
    assert events[9]["delta"] == {"type": "text_delta", "text": "\ndone"}


def test_response_items_come_one_after_the_other() -> None:
    items = _Items("resp_1")
    events = items.add(Delta("content", "a")) + items.add(Delta("content", "b"))
    events += items.add(Delta("tool_call", call=CALLS[0])) + items.close()
    assert [event["type"].removeprefix("response.") for event in events] == [
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    assert [item["type"] for item in items.done] == ["message", "function_call"]
    assert items.done[0]["content"][0]["text"] == "ab"
    assert [event["output_index"] for event in events] == [0] * 7 + [1] * 4


def test_a_feed_joins_what_waits() -> None:
    feed = Feed()
    for text in "abc":
        feed.tell(0, [Delta("content", text)])
    feed.tell(0, [Delta("tool_call", call=CALLS[0]), Delta("tool_call", call=CALLS[1])])
    feed.tell(1, [Delta("content", "x")])
    taken = feed.take()
    assert taken[0] == Piece(0, Delta("content", "abc"))
    assert [piece.choice for piece in taken] == [0, 0, 0, 1]
    assert feed.take() == []
    assert not feed.ready.is_set()


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "mine")
    assert OwnerKey("SOME_KEY").matches("mine")
    assert OwnerKey("SOME_KEY").fresh == ""
    made = OwnerKey("NO_SUCH_VARIABLE")
    assert made.matches(made.fresh)
    assert not made.matches("")
    assert new_session_key() != new_session_key()
    assert len(digest("x")) == 32
    assert presented([(b"authorization", b"bearer  a ")]) == "a"
    assert presented([(b"authorization", b"Bearer a"), (b"x-api-key", b"b")]) == "b"
    assert presented([(b"authorization", b"Basic a")]) == ""


def test_each_api_has_its_errors() -> None:
    assert shaped("/v1/messages", 429, "busy", "m")["error"]["type"] == "rate_limit_error"
    assert shaped("/v1/chat/completions", 429, "busy", "m") == {
        "error": {"message": "m", "type": "rate_limit_error", "code": "busy", "param": None}
    }


@pytest.mark.parametrize("raw", ['{"a": "\\ud83d"}', '{"\\udc00": 1}'])
def test_half_a_character_is_refused(raw: str) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        parse(raw.encode())
    assert parse(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}
