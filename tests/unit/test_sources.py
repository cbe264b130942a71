"""Prompts from files, reasoning-gym and functions; the split; demonstrations. Every error says what to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.config.data import Columns, JsonlSource, PythonSource, ReasoningGymSource
from sluice.config.sft import JsonlDemonstrations, PythonDemonstrations
from sluice.data.sources import load_prompts, python, split
from sluice.data.sources.demonstrations import load_demonstrations
from sluice.errors import ConfigError, DataError
from sluice.types import Message, Prompt

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(*rows: Any, name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines))
        return path

    return to_file


# ── jsonl ───────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_become_prompts(write: Write) -> None:
    path = write(
        b'\xef\xbb\xbf{"prompt": "1+1", "answer": 2, "level": 3}',
        b"   ",
        {"id": 7, "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "answer": None},
        {"prompt": "ß\u2028x", "answer": [1, 2.5]},
    )
    first, second, third = load_prompts(JsonlSource(path=path, task="calc", system="be brief"))
    assert first.messages == (Message("system", "be brief"), Message("user", "1+1"))
    assert (first.answer, first.task, first.metadata) == ("2", "calc", {"level": 3})
    assert first.id.startswith("calc-")
    assert (second.id, second.answer, len(second.messages)) == ("7", "", 3)
    assert third.answer == "[1, 2.5]"
    assert load_prompts(JsonlSource(path=path, task="calc", system="be brief"))[0].id == first.id, "stable"


def test_an_id_names_text_and_answer(write: Write) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}, {"prompt": "b", "answer": "1"}]
    forward = load_prompts(JsonlSource(path=write(*rows)))
    backward = load_prompts(JsonlSource(path=write(*reversed(rows))))
    assert len({prompt.id for prompt in forward}) == 3
    assert [prompt.id for prompt in backward[::-1]] == [prompt.id for prompt in forward], "place does not matter"


def test_missing_file_names_the_nearest(write: Write, tmp_path: Path) -> None:
    write({"prompt": "a"}, name="train.jsonl")
    with pytest.raises(DataError, match=r"(?s)trian\.jsonl does not exist\n  → did you mean 'train\.jsonl'\?"):
        load_prompts(JsonlSource(path=tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"(?s)nor does its folder.*working directory"):
        load_prompts(JsonlSource(path=tmp_path / "no" / "train.jsonl"))
    with pytest.raises(DataError, match="is a folder, not a file"):
        load_prompts(JsonlSource(path=tmp_path))


@pytest.mark.parametrize(
    "row, said",
    [
        (b'{"prompt": "a"', r"rows\.jsonl:2 is not JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt": NaN}', r"rows\.jsonl:2 is not JSON: NaN is no JSON number"),
        (b"[" * 100_000, r"rows\.jsonl:2 is not JSON: "),
        (b'{"prompt": "\xff"}', r"rows\.jsonl:2 is not UTF-8: byte 0xff at column 13"),
        ([1], r"rows\.jsonl:2 is a list, not an object"),
        ("text", r"rows\.jsonl:2 is a string, not an object"),
        ({"promt": "a", "answer": "b"}, "2 has no column 'prompt' for the prompt; its columns are 'promt', 'answer'\n"
         "  → set columns.prompt; did you mean 'promt'"),
        ({}, "its columns are none"),
        ({"prompt": None}, "column 'prompt' is null"),
        ({"prompt": " "}, "column 'prompt' is empty"),
        ({"prompt": 3}, "column 'prompt' is a number; a string or a list of messages was expected"),
        ({"prompt": []}, "column 'prompt' is an empty list"),
        ({"prompt": ["a"]}, "message 1 of column 'prompt' is a string, not an object"),
        ({"prompt": [{"role": "user"}]}, "message 1 of column 'prompt' has no 'content'"),
        ({"prompt": [{"role": "", "content": "a"}]}, "has a role that is a string"),
        ({"prompt": [{"role": "user", "content": None}]}, "has a content that is null; text was expected"),
        ({"prompt": [{"role": "user", "content": "a", "tool_calls": []}]}, "has 'tool_calls', which would be lost"),
        (b'{"prompt": "\\ud800"}', "the prompt holds half of a surrogate pair"),
        ({"prompt": "good"}, r"(?s)rows\.jsonl:1 and .*rows\.jsonl:2 have the same id 'default-"),
    ],
)  # fmt: skip
def test_bad_rows(write: Write, caplog: pytest.LogCaptureFixture, row: Any, said: str) -> None:
    path = write({"prompt": "good"}, row, {"prompt": "also good"})
    with pytest.raises(DataError, match=said) as caught:
        load_prompts(JsonlSource(path=path))
    assert caught.value.hint
    with caplog.at_level(logging.WARNING):
        loaded = load_prompts(JsonlSource(path=path, on_bad_row="skip"))
    assert [p.messages[0].content for p in loaded] == ["good", "also good"]
    assert "skipped 1 bad rows of 3, the first: " in caplog.text


def test_columns_that_were_set_must_be_there(write: Write) -> None:
    path = write({"q": "a", "target": "b", "key": "k"})
    columns = Columns(prompt="q", answer="target", id="key")
    assert load_prompts(JsonlSource(path=path, columns=columns))[0].id == "k"
    assert load_prompts(JsonlSource(path=path, columns=Columns(prompt="q")))[0].answer == ""
    with pytest.raises(DataError, match=r"no column 'targt' for the answer.*\n  → set columns.answer; .*'target'"):
        load_prompts(JsonlSource(path=path, columns=Columns(prompt="q", answer="targt")))
    with pytest.raises(DataError, match="no column 'name' for the id"):
        load_prompts(JsonlSource(path=path, columns=Columns(prompt="q", id="name")))


def test_two_system_messages_are_refused(write: Write) -> None:
    path = write({"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]})
    assert len(load_prompts(JsonlSource(path=path))[0].messages) == 2
    with pytest.raises(DataError, match="has a system message of its own"):
        load_prompts(JsonlSource(path=path, system="c"))


def test_ids_twice_and_empty_files(write: Write) -> None:
    with pytest.raises(DataError, match=r"(?s)rows\.jsonl:1 and .*rows\.jsonl:3 have the same id 'a'"):
        load_prompts(JsonlSource(path=write({"id": "a", "prompt": "1"}, b"", {"id": "a", "prompt": "2"})))
    for rows in ((), (b"\n \n",)):
        with pytest.raises(DataError, match=r"rows\.jsonl holds no usable row: it is empty"):
            load_prompts(JsonlSource(path=write(*rows)))
    with pytest.raises(DataError, match=r"all 2 rows are bad, the first: .*:1 is a list"):
        load_prompts(JsonlSource(path=write([1], []), on_bad_row="skip"))


# ── reasoning-gym ───────────────────────────────────────────────────────────────────────────────────────


def test_reasoning_gym_is_reproducible_and_logs_repetition(caplog: pytest.LogCaptureFixture) -> None:
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    config = ReasoningGymSource(dataset="chain_sum", params=params, size=1000, seed=3, system="short", task="sum")
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(config)
    assert len({p.messages for p in prompts}) == len(prompts) <= 200
    assert f"{1000 - len(prompts)} of 1000 instances repeat earlier ones" in caplog.text
    assert prompts == load_prompts(config)
    assert prompts[0].task == "sum"
    assert prompts[0].messages[0] == Message("system", "short")
    assert json.loads(json.dumps(dict(prompts[0].metadata))) == prompts[0].metadata


@pytest.mark.parametrize(
    "dataset, params, said",
    [
        ("chain_sums", {}, r"no dataset 'chain_sums'\n  → did you mean 'chain_sum'\?"),
        ("composite", {}, "no dataset 'composite'"),
        ("chain_sum", {"max_term": 3}, r"has no parameter 'max_term'\n  → did you mean 'max_terms'\?"),
        (
            "chain_sum",
            {"min_terms": 2, "max_terms": 1},
            "refuses params.*max_terms = 1: max_terms must be >=",
        ),
        ("chain_sum", {"allow_negation": True, "min_digits": "a"}, "refuses params.min_digits = 'a': "),
        ("chain_sum", {"size": 3}, "params.size is set by the source itself\n  → set `size` beside `params`"),
    ],
)
def test_reasoning_gym_misconfigured(dataset: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"(?s){said}"):
        load_prompts(ReasoningGymSource(dataset=dataset, params=params, size=2))


# ── functions ───────────────────────────────────────────────────────────────────────────────────────────

HEADER = (
    "from sluice.types import Message, Prompt\ndef p(i, **kw): return Prompt(i, 't', (Message('user', i),), **kw)\n"
)


@pytest.fixture
def path(tmp_path: Path) -> Callable[[str], str]:
    def to_file(body: str) -> str:
        file = tmp_path / f"source_{abs(hash(body))}.py"
        file.write_text(HEADER + body + "\n")
        return f"{file}:make"

    return to_file


def test_python_source(path: Callable[[str], str]) -> None:
    config = PythonSource(path=path("def make(n):\n  for i in range(n): yield p(str(i))"), params={"n": 3})
    assert [prompt.id for prompt in load_prompts(config)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "body, said",
    [
        ("def make(): return [{'id': 1}]", r"item 1 of .*:make is a dict, not a Prompt\n  → build sluice.types.Prompt"),
        ("def make(): return []", "yielded no prompt"),
        ("def make(): return None", "returned a NoneType, not an iterable of Prompt"),
        ("def make(): return 'text'", "returned a str"),
        ("async def make(): yield p('a')", "returned a async_generator"),
        ("def make():\n  yield p('a')\n  1 / 0", r"raised after 1 items: ZeroDivisionError: .*source_\d+\.py:5\)"),
        ("def make(): return [p('a'), p('b'), p('a')]", "items 1 and 3 of .* have the same id 'a'"),
        ("def make(): return [Prompt('a', 't', ())]", "messages must be a tuple of Message, at least one"),
        ("def make(): return [Prompt('a', 't', ('hi',))]", "messages must be a tuple of Message"),
        ("def make(): return [Prompt('a', 't', 3)]", "messages must be a tuple of Message"),
        ("def make(): return [p('a', answer=42)]", "the answer is a int, not a string"),
        ("def make(): return [p('')]", "the id is empty"),
        ("def make(): return [p('a', answer='\\ud800')]", "the answer holds half of a surrogate pair"),
        ("def make(): return [p('a', metadata={'x': {1}})]", "metadata cannot be written to the log: .*set"),
        ("def make(): return [p('a', metadata={'x': float('nan')})]", "metadata cannot be written to the log"),
    ],
)
def test_python_source_errors(path: Callable[[str], str], body: str, said: str) -> None:
    with pytest.raises(DataError, match=f"(?s){said}") as caught:
        load_prompts(PythonSource(path=path(body)))
    assert caught.value.hint


def test_python_source_misconfigured(path: Callable[[str], str]) -> None:
    config = PythonSource(path=path("def make(count=1): return [p('a')]"), params={"cont": 2})
    with pytest.raises(ConfigError, match=r"argument 'cont'; it is \(count=1\); did you mean 'count'"):
        load_prompts(config)
    with pytest.raises(ConfigError, match="is a int, not a function"):
        load_prompts(PythonSource(path=path("make = 3")))


def test_a_source_without_end(path: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "MAX_ITEMS", 50)
    body = "def make():\n  i = 0\n  while True:\n    i += 1\n    yield p(str(i))"
    with pytest.raises(DataError, match="yielded more than 50 items"):
        load_prompts(PythonSource(path=path(body)))


# ── split ───────────────────────────────────────────────────────────────────────────────────────────────


def made(*texts: str) -> list[Prompt]:
    return [Prompt(f"p{i}", "t", (Message("user", text),)) for i, text in enumerate(texts)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=3), min_size=2, max_size=40), st.integers(0, 2**32), st.data())
def test_split_keeps_texts_apart(texts: list[str], seed: int, data: st.DataObject) -> None:
    prompts = made(*texts)
    distinct = len(set(texts))
    count = data.draw(st.integers(0, distinct))
    if count and count >= distinct:
        with pytest.raises(DataError, match=f"has {len(texts)} prompts with {distinct} distinct texts"):
            split(prompts, count, seed)
        return
    train, held_out = split(prompts, count, seed)
    assert len(held_out) == len({prompt.messages for prompt in held_out}) == count
    assert not {prompt.messages for prompt in held_out} & {prompt.messages for prompt in train}
    assert {p.messages for p in train} | {p.messages for p in held_out} == {p.messages for p in prompts}
    assert [p for p in prompts if p in train] == train
    assert [p for p in prompts if p in held_out] == held_out
    assert split(prompts, count, seed) == (train, held_out)


def test_split_depends_on_the_seed_not_on_the_order(caplog: pytest.LogCaptureFixture) -> None:
    prompts = made(*(str(i) for i in range(200)))
    _, one = split(prompts, 50, 1)
    _, turned = split(prompts[::-1], 50, 1)
    _, two = split(prompts, 50, 2)
    assert {p.id for p in one} == {p.id for p in turned} != {p.id for p in two}
    split(made("a", "a", "b", "b"), 1, 0)
    assert "1 prompts have the text of a held-out one" in caplog.text


# ── demonstrations ──────────────────────────────────────────────────────────────────────────────────────


def test_jsonl_demonstrations(write: Write) -> None:
    path = write({"prompt": "1+1", "response": "2"}, {"prompt": "1+2", "response": "3"})
    pairs = load_demonstrations(JsonlDemonstrations(path=path))
    assert [(prompt.messages[0].content, response) for prompt, response in pairs] == [("1+1", "2"), ("1+2", "3")]
    path = write({"prompt": "1+1", "answer": "2"})
    with pytest.raises(DataError, match="no column 'response' for the answer; its columns are 'prompt', 'answer'"):
        load_demonstrations(JsonlDemonstrations(path=path))


def test_python_demonstrations(path: Callable[[str], str]) -> None:
    body = "def make(prompts, seed, times=1): return [(q, q.id * times + str(seed)) for q in prompts]"
    config = PythonDemonstrations(path=path(body), params={"times": 2})
    prompts = made("a", "b")
    assert load_demonstrations(config, prompts, seed=9) == [(prompts[0], "p0p09"), (prompts[1], "p1p19")]


@pytest.mark.parametrize(
    "body, said",
    [
        ("def make(prompts, seed): return prompts", r"item 1 .* is a Prompt, not a pair"),
        ("def make(prompts, seed): return [(prompts[0], 3)]", "the response is a int, not a string"),
        ("def make(prompts, seed): return [('a', 'b')]", "is a str, not a Prompt"),
        ("def make(prompts, seed): return []", "yielded no demonstration"),
        ("def make(prompts): return []", "cannot be called with 2 arguments"),
    ],
)
def test_python_demonstrations_errors(path: Callable[[str], str], body: str, said: str) -> None:
    with pytest.raises((DataError, ConfigError), match=said):
        load_demonstrations(PythonDemonstrations(path=path(body)), made("a"), seed=0)
