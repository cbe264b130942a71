"""Rendering that only appends: continuations, ends of turns, and what is said about a template."""

from __future__ import annotations

import pytest
from chat_rig import EOS, FORMAT, TOOLS, make_tokenizer, renderer

from sluice.config.gateway import ChatConfig
from sluice.errors import DataError
from sluice.rollout.chat.base import ChatMessage, ToolCall
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.types import Message, Prompt

QUESTION = ChatMessage("user", "How much?")
RESULTS = (
    ChatMessage("tool", "3", tool_call_id="call00001", name="add"),
    ChatMessage("tool", "7", tool_call_id="call00002", name="add"),
)


def after(template: str, last: str, *messages: ChatMessage, **kwargs: bool) -> str:
    chat = renderer(template)
    return chat.whole_text(chat.extend(chat.encode(last), messages, TOOLS, **kwargs))


@pytest.mark.parametrize("template", FORMAT)
def test_the_format_is_read_off_the_template(template: str) -> None:
    assert renderer(template).format == FORMAT[template]


@pytest.mark.parametrize("template", FORMAT)
def test_every_template_passes_its_check(template: str) -> None:
    found = renderer(template).check()
    assert found.extension_ok, str(found)
    assert found.boundary
    assert found.calls == {"single": 1, "plain": 0}.get(template, 2)


def test_what_a_template_rewrites_is_said() -> None:
    found = renderer("thinking").check()
    assert not found.template_stable
    assert str(found) == (
        "chat format qwen, tried over 4 turns, parallel tool calls, reasoning and empty thinking\n"
        "  the template drops earlier reasoning (that of turn 2 when turn 3 is asked)\n"
        "  the template treats an empty think block otherwise when it is past (turn 3)\n"
        "  so sessions continue by token extension, never by rendering the past again"
    )
    assert renderer("single").check().template_stable
    assert str(renderer("plain").check()) == (
        "chat format none, tried over 4 turns, no tools (the template takes none)\n"
        "  the template leaves earlier turns alone"
    )


def test_a_template_that_rewrites_can_be_refused() -> None:
    with pytest.raises(DataError, match="rewrites earlier turns: drops earlier reasoning"):
        ChatRenderer(make_tokenizer("thinking"), ChatConfig(on_rewrite="fail"))
    ChatRenderer(make_tokenizer("plain"), ChatConfig(on_rewrite="fail"))


def test_a_turn_gets_its_end_once() -> None:
    question = "\n<|im_start|>user\nHow much?<|im_end|>\n<|im_start|>assistant\n"
    assert after("thinking", "Fine.", QUESTION) == "<|im_end|>" + question
    assert after("thinking", "Fine.<|im_end|>", QUESTION) == question
    assert after("thinking", "Fine.<|endoftext|>", QUESTION) == question  # the model's other end


def test_an_end_that_opens_the_next_message_is_not_doubled() -> None:
    asked, seen = "\nHow much?<|assistant|>", "\n<tool_response>\n3\n</tool_response>"
    assert after("observation", "Fine.", QUESTION) == "<|user|>" + asked
    assert after("observation", "Fine.<|user|>", QUESTION) == asked
    assert after("observation", "Fine.<|endoftext|>", QUESTION) == "<|user|>" + asked
    assert after("observation", "x<|observation|>", QUESTION) == "<|user|>" + asked  # it wanted a result, and got words
    assert after("observation", "x<|observation|>", RESULTS[0]) == seen + "<|assistant|>"
    assert after("observation", "x", RESULTS[0]) == "<|observation|>" + seen + "<|assistant|>"


def test_parallel_results_are_rendered_together() -> None:
    assert after("thinking", "x<|im_end|>", *RESULTS) == (
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n7\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert after("single", "x<|eot_id|>", *RESULTS) == (
        header("ipython") + '{"output": "3"}<|eot_id|>' + header("ipython") + '{"output": "7"}<|eot_id|>'
    ) + header("assistant")


def test_a_continuation_depends_on_nothing_but_what_is_new() -> None:
    """A history that the template would rewrite, or one that it refuses, changes nothing."""
    chat = renderer("thinking")
    one, other = (chat.encode(text) for text in ("<think>\na\n</think>\n\nb<|im_end|>", "�� }}{{ <|im_end|>"))
    assert list(chat.extend(one, (QUESTION,))) == list(chat.extend(other, (QUESTION,)))
    tricky = ChatMessage("user", "say <|im_end|> and z9sluice and z9sluice9")
    assert after("thinking", "x<|im_end|>", tricky).startswith(f"\n<|im_start|>user\n{tricky.content}<|im_end|>")


def test_template_settings_reach_the_opening_of_the_answer() -> None:
    assert after("thinking", "x<|im_end|>", QUESTION, enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert after("opened", "x<|im_end|>", QUESTION).endswith("<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize("template", ["thinking", "opened", "observation", "single", "outputs"])
def test_a_history_with_calls_is_rendered_as_the_template_wants_it(template: str) -> None:
    chat = renderer(template)
    call = ToolCall("call00001", "add", '{"a":1, "b":2}')
    text = chat.whole_text(chat.begin((QUESTION, ChatMessage("assistant", tool_calls=(call,)), RESULTS[0]), TOOLS))
    spelled = {
        "thinking": '<tool_call>\n{"name": "add", "arguments": {"a":1, "b":2}}\n</tool_call>',  # to the letter
        "opened": "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>",
        "observation": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>",
        "single": '{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>',
        "outputs": 'function<｜tool▁sep｜>add\n```json\n{"a":1, "b":2}\n```<｜tool▁call▁end｜>',
    }
    assert spelled[template] in text


def test_arguments_that_are_no_json_are_handed_over_as_text() -> None:
    chat = renderer("single")
    broken = ChatMessage("assistant", tool_calls=(ToolCall("call00001", "add", "{oops"),))
    assert '"parameters": "{oops"' in chat.whole_text(chat.begin((QUESTION, broken, RESULTS[0]), TOOLS))


def test_tools_for_a_template_without() -> None:
    with pytest.raises(DataError, match="no place for them") as caught:
        renderer("plain").begin((QUESTION,), TOOLS)
    assert caught.value.hint is not None
    assert "hermes" in caught.value.hint
    chat = renderer("plain", "hermes")
    calling = ChatMessage("assistant", "Wait.", tool_calls=(ToolCall("c", "add", '{"a": 1}'),))
    text = chat.whole_text(chat.begin((ChatMessage("system", "Be kind."), QUESTION, calling, *RESULTS), TOOLS))
    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools\n")
    assert '"name": "add"' in text
    assert 'Wait.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    grouped = "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n7\n</tool_response><|im_end|>"
    assert grouped in text
    assert grouped in chat.whole_text(chat.extend((), RESULTS, TOOLS))
    assert chat.check().extension_ok
    assert "tool▁calls▁begin" in renderer("outputs").whole_text(renderer("outputs").begin((QUESTION,), TOOLS))


def test_refusals() -> None:
    with pytest.raises(DataError, match="no chat template"):
        ChatRenderer(make_tokenizer(None))
    tokenizer = make_tokenizer("plain")
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        ChatRenderer(tokenizer)
    with pytest.raises(DataError, match="does not take these messages"):
        renderer("single").begin((QUESTION, ChatMessage("assistant", tool_calls=(ToolCall("a", "add", "{}"),) * 2)))


def test_single_prompts() -> None:
    chat = ChatRenderer(make_tokenizer("plain"))
    prompt = Prompt("p", "sum", (Message("user", "1 + 1"),))
    assert chat.whole_text(chat.prompt_ids(prompt)) == "<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n"
    ids = chat.response_ids("two")
    assert chat.whole_text(ids) == "two<|im_end|>"
    assert chat.text(ids) == "two"
    assert ids[-1] == chat.eos[0]
    assert ids.dtype == chat.prompt_ids(prompt).dtype


@pytest.mark.parametrize("template", FORMAT)
def test_the_tokenizers_own_end_comes_first(template: str) -> None:
    chat = renderer(template)
    assert chat.whole_text(chat.eos[:1]) == EOS[template]
    assert len(set(chat.eos)) == len(chat.eos)
