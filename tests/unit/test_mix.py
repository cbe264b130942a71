"""Several weighted tasks: whose turn it is, what is held out, and what is refused."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sluice.config.data import DataConfig
from sluice.config.load import load_recipe
from sluice.data.mix import MixStrategy, Turns
from sluice.errors import DataError
from sluice.orchestrate.setup import load_data, make_strategy
from sluice.types import Message, Prompt

WEIGHTS = st.lists(st.floats(min_value=0.01, max_value=100), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.integers(0, 5))
def test_shares_hold_from_the_first_turn_on(weights: list[float], seed: int) -> None:
    """Tijdeman's bound: after n turns a task of share p has had n·p, give or take 1 - 1/(2k - 2)."""
    names = {f"t{number}": weight for number, weight in enumerate(weights)}
    total = sum(map(Fraction, weights))
    bound = 1 - Fraction(1, 2 * len(weights) - 2) if len(weights) > 1 else Fraction(0)
    turns = Turns(names, seed)
    for turn in range(1, 200):
        turns.next()
        for name, weight in names.items():
            assert abs(turns.counts[name] - turn * Fraction(weight) / total) <= bound


def test_turns_by_hand() -> None:
    turns = Turns({"a": 3, "b": 1}, seed=0)
    assert "".join(turns.next() for _ in range(8)) == "aabaaaba", "b is due when half a turn behind: at turns 2 to 4"
    order = ["".join(turns.next() for _ in range(4)) for turns in (Turns({"a": 1, "b": 1}, seed) for seed in range(8))]
    assert set(order) == {"abab", "baba"}, "the seed decides between equals"


def prompts(task: str, count: int) -> list[Prompt]:
    return [Prompt(f"{task}{number}", task, (Message("user", f"{task} {number}"),)) for number in range(count)]


def mixed(seed: int = 0) -> MixStrategy:
    return MixStrategy(
        {"small": prompts("small", 3), "large": prompts("large", 1000)},
        weights={"small": 1.0, "large": 2.0},
        samples={"small": 8, "large": 4},
        seed=seed,
    )


def test_a_small_task_goes_round_while_a_large_one_does_not_end() -> None:
    strategy = mixed()
    drawn = [strategy.next() for _ in range(90)]
    small = [prompt.id for prompt, _ in drawn if prompt.task == "small"]
    large = [prompt.id for prompt, _ in drawn if prompt.task == "large"]
    assert (len(small), len(large), len(set(large))) == (30, 60, 60)
    assert all(sorted(small[at : at + 3]) == ["small0", "small1", "small2"] for at in range(0, 30, 3)), "whole passes"
    assert {(prompt.task, n) for prompt, n in drawn} == {("small", 8), ("large", 4)}


@pytest.mark.parametrize("stop", [0, 1, 7, 50])
def test_a_resumed_mix_goes_on_where_it_stood(stop: int) -> None:
    straight, first, resumed = mixed(), mixed(), mixed()
    expected = [straight.next()[0].id for _ in range(100)]
    for _ in range(stop):
        first.next()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [resumed.next()[0].id for _ in range(100 - stop)] == expected[stop:]


def test_other_tasks_are_not_resumed() -> None:
    other = MixStrategy({"small": prompts("small", 3)}, weights={"small": 1}, samples={"small": 8}, seed=0)
    with pytest.raises(DataError, match=r"the checkpoint mixes \['small'\], the recipe \['large', 'small'\]"):
        mixed().load_state_dict(other.state_dict())


# ── from a recipe ───────────────────────────────────────────────────────────────────────────────────────


def source(folder: Path, name: str, texts: list[str]) -> dict[str, Any]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "prompt": text}) + "\n" for n, text in enumerate(texts)))
    return {"type": "jsonl", "path": str(path)}


def config(parts: list[dict[str, Any]], **values: Any) -> DataConfig:
    return DataConfig.model_validate({"train": {"type": "mix", "parts": parts}, **values})


def test_each_task_holds_out_its_share_under_its_own_name(tmp_path: Path) -> None:
    numbers = source(tmp_path, "numbers", [str(n) for n in range(20)])
    words = source(tmp_path, "words", [f"w{n}" for n in range(10)])
    tests = source(tmp_path, "tests", ["w3", "new"])
    parts = [
        {"name": "a", "source": numbers}, {"name": "b", "source": words, "eval": tests, "samples": 2},
        {"name": "c", "source": source(tmp_path, "c", ["x", "y"]), "eval_prompts": 1},
    ]  # fmt: skip
    made = config(parts, eval_prompts=5, strategy={"type": "groups", "samples": 6})
    data = load_data(made, seed=0)
    counts = {task: sum(prompt.task == task for prompt in data.held_out) for task in "abc"}
    assert counts == {"a": 5, "b": 2, "c": 1}
    assert {task: sum(prompt.task == task for prompt in data.train) for task in "abc"} == {"a": 15, "b": 9, "c": 1}
    assert len({prompt.id for prompt in data.train}) == 25, "equal ids of two files do not meet"
    assert not {prompt.messages for prompt in data.train} & {prompt.messages for prompt in data.held_out}
    drawn = [make_strategy(made, data, seed=0).next() for _ in range(1)]
    assert drawn[0][1] in (2, 6)


def test_an_even_share_of_held_out_prompts(tmp_path: Path) -> None:
    parts = [{"name": name, "source": source(tmp_path, name, [f"{name}{n}" for n in range(9)])} for name in "abc"]
    held_out = load_data(config(parts, eval_prompts=8), seed=1).held_out
    assert [sum(prompt.task == task for prompt in held_out) for task in "abc"] == [3, 3, 2]


@pytest.mark.parametrize(
    ("texts", "part", "said"),
    [
        ([], {}, r"task 'b': .*b\.jsonl holds no usable row: it is empty"),
        (["x", "y"], {"eval_prompts": 2}, "task 'b': 2 prompts should be held out, .* none would be left to train on"),
        (["a1", "a2"], {"eval_prompts": 0}, "task 'b' has no prompt to train on: every one has the text of a held-out"),
    ],
)
def test_a_task_that_is_empty_is_named(tmp_path: Path, texts: list[str], part: dict[str, Any], said: str) -> None:
    held = source(tmp_path, "held", ["a1", "a2"])
    parts = [
        {"name": "a", "source": source(tmp_path, "a", ["a1", "a2", "a3"]), "eval": held},
        {"name": "b", "source": source(tmp_path, "b", texts), **part},
    ]
    with pytest.raises(DataError, match=said):
        load_data(config(parts), seed=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"type": "mix", "parts": []}}, "at least 1 item"),
        ({"strategy": {"type": "python", "path": "s.py:S"}}, r"strategy.type = 'python' would not see the weights"),
        ({"eval": {"type": "jsonl", "path": "e"}}, r"those of train.parts would not be read"),
        ({"train": {"type": "mix", "parts": [{"name": "a", "source": {"type": "jsonl", "path": "x"}}] * 2}},
         "two parts are called 'a'"),
        ({"train": {"type": "mix", "parts": [{"name": "a", "source": {"type": "jsonl", "path": "x", "task": "t"}}]}},
         "source.task = 't', but the part's name is the task: 'a'"),
        ({"train": {"type": "mix", "parts": [{"name": "a", "weight": 0, "source": {"type": "jsonl", "path": "x"}}]}},
         "greater than 0"),
        ({"train": {"type": "mix", "parts": [{"name": "a b", "source": {"type": "jsonl", "path": "x"}}]}}, "pattern"),
    ],
)  # fmt: skip
def test_mixes_that_make_no_sense(change: dict[str, Any], said: str) -> None:
    part = {"name": "a", "source": {"type": "jsonl", "path": "x"}, "eval_prompts": 3}
    with pytest.raises(ValidationError, match=said):
        DataConfig.model_validate({"train": {"type": "mix", "parts": [part]}, **change})


def test_a_recipe_of_several_tasks_finds_files_beside_it_and_keeps_long_templates(tmp_path: Path) -> None:
    source(tmp_path, "rows", ["a"])
    text = "{prompt} " + "Think. " * 100
    (tmp_path / "r.toml").write_text(
        'model = { path = "m" }\nrewards = [{ type = "exact", tasks = ["a"] }]\n[data.train]\ntype = "mix"\n'
        f'[[data.train.parts]]\nname = "a"\nsource = {{ type = "jsonl", path = "rows.jsonl", template = "{text}" }}\n'
    )
    (part,) = load_recipe(str(tmp_path / "r.toml")).data.train.parts  # pyright: ignore[reportAttributeAccessIssue]
    assert (part.source.path, part.source.template) == (tmp_path / "rows.jsonl", text)
