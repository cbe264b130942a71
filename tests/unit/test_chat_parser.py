"""Parsing of sampled turns: what each family writes, how it streams, and what is left word for word."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest
from chat_rig import TOOLS, backend, fallback_renderer, renderer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response

from sluice.rollout.chat.base import Delta, Parsed, ToolCall
from sluice.rollout.chat.formats import typed
from sluice.rollout.chat.renderer import ChatRenderer

QWEN = (
    "<think>\nAdd them, 世界.\n</think>\n\nFine 👩‍👩‍👧:\n"
    '<tool_call>\n{"name": "add", "arguments": {"a":1,  "b": 2.50}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>'
)
CODER = (
    "Add them.\n</think>\n\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
    "<parameter=note>\n01\n  two\n</parameter>\n<parameter=loud>\nTrue\n</parameter>\n"
    "</function>\n</tool_call><|im_end|>"
)
GLM = (
    "\n<think>Add them.</think>\nFine.\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    '<arg_key>flags</arg_key>\n<arg_value>["x", "é"]</arg_value>\n</tool_call><|observation|>'
)
DEEPSEEK = (
    'Fine.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a":1}\n```<｜tool▁call▁end｜>\n'
    '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"b": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
)


def calls(*arguments: str) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(f"call_{index}", "add", text) for index, text in enumerate(arguments))


def fold(deltas: Sequence[Delta], malformed: tuple[str, ...]) -> Parsed:
    """A turn put together again from its pieces."""
    return Parsed(
        "".join(delta.text for delta in deltas if delta.kind == "content"),
        "".join(delta.text for delta in deltas if delta.kind == "reasoning"),
        tuple(delta.call for delta in deltas if delta.call is not None),
        malformed,
    )


def parse(chat: ChatRenderer, ids: Sequence[int], cuts: Sequence[int] = (), tools: bool = True) -> Parsed:
    """Feed `ids` in the pieces that `cuts` make; the deltas must add up to the turn."""
    parser = chat.parser(TOOLS if tools else ())
    deltas: list[Delta] = []
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    for start, end in itertools.pairwise(edges):
        deltas += parser.feed(ids[start:end])
    rest, parsed = parser.close()
    assert fold([*deltas, *rest], parsed.malformed) == parsed
    return parsed


def read(template: str, text: str, format: str = "auto", *, tools: bool = True) -> Parsed:
    chat = renderer(template, format)
    ids = [int(id) for id in chat.encode(text)]
    whole = parse(chat, ids, tools=tools)
    assert parse(chat, ids, range(len(ids)), tools=tools) == whole
    return whole


@pytest.mark.parametrize(
    ("template", "text", "wanted"),
    [
        ("thinking", QWEN, Parsed("Fine 👩‍👩‍👧:", "Add them, 世界.", calls('{"a":1,  "b": 2.50}', "{}"))),
        ("opened", CODER, Parsed("", "Add them.", calls('{"a": 1, "note": "01\\n  two", "loud": true}'))),
        ("observation", GLM, Parsed("Fine.", "Add them.", calls('{"a": 1, "flags": ["x", "é"]}'))),
        ("outputs", DEEPSEEK, Parsed("Fine.", "", calls('{"a":1}', '{"b": 2}'))),
        ("single", '{"name": "add", "parameters": {"a":1}}<|eot_id|>', Parsed("", "", calls('{"a":1}'))),
        (
            "single",
            '<|python_tag|>{"name": "add", "parameters": {"a":1}}; {"name": "add", "parameters": {}}<|eom_id|>',
            Parsed("", "", calls('{"a":1}', "{}")),
        ),
        ("single", '{"answer": 5}<|eot_id|>', Parsed('{"answer": 5}')),
        ("plain", " as it is \n<think><|im_end|>", Parsed(" as it is \n<think>")),
        ("thinking", "<think>\n\n</think>\n\nFine.\n<|im_end|>", Parsed("Fine.\n")),
        ("thinking", "No <think> later.<|im_end|>", Parsed("No <think> later.")),
        ("thinking", "<think>\nstill at it\n", Parsed("", "still at it\n")),
        ("thinking", " \n<|im_end|>", Parsed(" \n")),
        ("thinking", "", Parsed()),
    ],
)
def test_what_a_family_writes(template: str, text: str, wanted: Parsed) -> None:
    assert read(template, text) == wanted


@pytest.mark.parametrize(
    "block",
    [
        '<tool_call>\n{"name": "add", "arguments": {oops}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        "<tool_call></tool_call>",
        "<tool_call>add(1, 2)</tool_call>",
        f'<tool_call>{{"name": "add", "arguments": {{"a": {"[" * 5000}</tool_call>',
    ],
)
def test_malformed_calls_stay_word_for_word(block: str) -> None:
    text = f"Well: \n {block} \n and more."
    assert read("thinking", f"{text}<|im_end|>") == Parsed(text, malformed=(block,))


@pytest.mark.parametrize(
    ("template", "cut"),
    [
        ("thinking", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}'),
        ("opened", "<tool_call>\n<function=add>\n<parameter=a>\n1"),
        ("observation", "<tool_call>add\n<arg_key>a</arg_key>"),
        ("single", '{"name": "add", "parameters": {"a": '),
        ("single", '<|python_tag|>{"name": "add", "parameters": {"a": '),
        ("outputs", '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"b": 2'),
    ],
)
def test_truncated_calls_are_no_calls(template: str, cut: str) -> None:
    text = f"</think>{cut}" if template == "opened" else cut
    assert read(template, text) == Parsed(cut, malformed=(cut,))


def test_a_call_after_a_broken_one_counts() -> None:
    good, broken = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "<tool_call>x</tool_call>"
    assert read("thinking", f"{broken}\n{good}") == Parsed(broken, "", calls('{"a": 1}'), (broken,))
    assert read("thinking", f"A\n{good}\nB") == Parsed("A\nB", "", calls('{"a": 1}'))


def test_arguments_inside_a_json_string() -> None:
    text = '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert read("thinking", text).tool_calls == calls('{"a": 1}')


def test_without_tools_a_call_is_content() -> None:
    """An agent that describes tools in its own prompt reads them out of the text itself."""
    assert read("thinking", QWEN, tools=False).content == QWEN[QWEN.index("Fine") : -len("<|im_end|>")]
    assert read("single", '{"name": "add", "parameters": {}}', tools=False).content.startswith('{"name"')


def test_hermes_is_qwen_without_reasoning() -> None:
    text = '<think>a</think><tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert read("plain", text, "hermes") == Parsed("<think>a</think>", "", calls("{}"))


def test_content_is_told_as_soon_as_it_is_certain() -> None:
    chat = renderer("thinking")
    parser = chat.parser(TOOLS)
    told = ["".join(delta.text for delta in parser.feed([int(id)])) for id in chat.encode("Fine, <tool_ca and 世界")]
    assert told[0] == "F"
    assert "".join(told) == "Fine, <tool_ca and 世界"
    assert [piece for piece in told if "<tool_ca" in piece]  # held while it might have become a mark


def test_the_end_of_the_prompt_decides_where_an_answer_begins() -> None:
    chat = renderer("opened")
    answer = [int(id) for id in chat.encode("Hm.\n</think>\n\nFine.")]
    assert parse(chat, answer) == Parsed("Fine.", "Hm.")
    for prompt, wanted in (("<think>\n", Parsed("Fine.", "Hm.")), ("assistant\n", Parsed("Hm.\n</think>\n\nFine."))):
        parser = chat.parser(TOOLS, prompt=chat.encode(prompt))
        parser.feed(answer)
        assert parser.close()[1] == wanted
    closed = renderer("thinking", enable_thinking=False).parser()
    closed.feed(chat.encode("\nFine."))
    assert closed.close()[1] == Parsed("Fine.")


TEXTS = st.lists(
    st.sampled_from(
        [
            *(
                "<think>",
                "</think>",
                "<tool_call>",
                "</tool_call>",
                "<tool_",
                "</",
                "\n",
                " ",
                "{",
                "}",
                "世",
                "👩‍👩‍👧",
            ),
            *('{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": {}}', "add", "<|python_tag|>"),
            *("<function=add>", "</function>", "<parameter=a>", "</parameter>", "<arg_key>a</arg_key>", "<|im_end|>"),
            *(
                "<arg_value>1</arg_value>",
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁call▁begin｜>",
                "<｜tool▁sep｜>",
                "<｜tool▁call▁end｜>",
            ),
        ]
    ),
    max_size=12,
).map("".join)
FORMATS = st.sampled_from(["none", "qwen", "qwen_coder", "hermes", "glm", "llama", "deepseek"])
CUTS = st.lists(st.integers(0, 200), max_size=8)


@settings(deadline=None)
@given(TEXTS, FORMATS, CUTS, st.booleans())
def test_how_a_text_is_cut_changes_nothing(text: str, format: str, cuts: list[int], tools: bool) -> None:
    chat = renderer("plain", format)
    ids = [int(id) for id in chat.encode(text)]
    whole = parse(chat, ids, tools=tools)
    assert parse(chat, ids, cuts, tools) == whole
    assert parse(chat, ids, range(len(ids)), tools) == whole


@settings(deadline=None)
@given(st.lists(st.integers(0, backend().get_vocab_size() - 1), max_size=30), FORMATS, CUTS)
def test_how_any_ids_are_cut_changes_nothing(ids: list[int], format: str, cuts: list[int]) -> None:
    """Random ids: broken UTF-8, special tokens in the middle, halves of marks."""
    chat = renderer("plain", format)
    assert parse(chat, ids, cuts) == parse(chat, ids) == parse(chat, ids, range(len(ids)))


@settings(deadline=None)
@given(st.lists(st.integers(0, backend().get_vocab_size() - 1), max_size=30))
def test_streamed_text_is_the_decoded_whole(ids: list[int]) -> None:
    chat = renderer("plain")
    parser = chat.parser()
    pieces = [delta.text for id in ids for delta in parser.feed([id])]
    pieces += [delta.text for delta in parser.close()[0]]
    assert "".join(pieces) == chat.text(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, 264) | st.sampled_from([3 + byte for byte in "世é👩".encode()]), max_size=20), CUTS)
def test_byte_fallback_vocabularies_stream_too(ids: list[int], cuts: list[int]) -> None:
    """A byte token more can turn a whole run of them into replacement characters."""
    chat = fallback_renderer()
    assert parse(chat, ids, cuts) == parse(chat, ids, range(len(ids))) == Parsed(chat.text(ids))


_NAME = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
_PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<\r\x1c\x1d\x1e\x1f\x85\xa0"), min_size=1).map(
    str.strip
)
_JSON = st.recursive(st.none() | st.booleans() | st.integers() | _PLAIN, lambda inner: st.lists(inner, max_size=3))


@settings(deadline=None)
@given(_PLAIN, _PLAIN, st.lists(st.tuples(_NAME, st.dictionaries(_NAME, _JSON, max_size=3)), max_size=3))
def test_well_formed_turns_read_as_transformers_reads_them(
    reasoning: str, content: str, made: list[tuple[str, dict[str, object]]]
) -> None:
    blocks = "".join(
        f"\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in made
    )
    text = f"<think>\n{reasoning}\n</think>\n\n{content}{blocks}"
    template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {"content": "text", "repeats": True, "join": ""},
            "reasoning": {"open": "<think>", "close": "</think>", "content": "text"},
            "calls": {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True},
        },
    }
    theirs = parse_response(text, template, prefix="")
    chat = renderer("thinking")
    ours = parse(chat, [int(id) for id in chat.encode(text)])
    assert ours.reasoning.strip() == theirs.get("reasoning", "")
    assert ours.content.strip() == theirs.get("content", "")
    assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in ours.tool_calls] == theirs.get(
        "calls", []
    )


@pytest.mark.parametrize(
    ("text", "schema", "wanted"),
    [
        ("01234", {"type": "string"}, "01234"),
        ("7", {"type": "integer"}, 7),
        ("7.0", {"type": "integer"}, 7),
        ("seven", {"type": "integer"}, "seven"),
        ("7.5", {"type": "number"}, 7.5),
        ("True", {"type": "boolean"}, True),
        ("true", {"type": "integer"}, "true"),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("[1", {"type": "array"}, "[1"),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("7", None, 7),
        ("seven", None, "seven"),
        ("7", {"type": ["string", "integer"]}, 7),
        ("NaN", {"type": "number"}, "NaN"),
    ],
)
def test_values_take_the_type_of_the_schema(text: str, schema: object, wanted: object) -> None:
    value = typed(text, schema)
    assert value == wanted
    assert type(value) is type(wanted)


def test_ids_of_calls_come_from_the_caller() -> None:
    chat = renderer("thinking")
    parser = chat.parser(TOOLS, lambda index: f"s1-{index}")
    parser.feed(chat.encode(QWEN))
    assert [call.id for call in parser.close()[1].tool_calls] == ["s1-0", "s1-1"]
