"""Regular expressions on what a model wrote: the regex reward, and patterns that must not hang a run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import ValidationError

from sluice.config.rewards import ExactReward, RegexReward, RewardConfig
from sluice.errors import RewardError
from sluice.rewards.base import VerifierFailure
from sluice.rewards.rubric import Rubric
from sluice.types import Message, Prompt

ENDLESS = "a" * 200 + "b"
"""`(a|aa)+$` tries as many ways to read this as there are Fibonacci numbers."""


def prompt(answer: str = "4.2") -> Prompt:
    return Prompt("p7", "calc", (Message("user", "?"),), answer)


def score(config: RewardConfig, response: str, given: Prompt | None = None) -> float:
    return asyncio.run(Rubric([config]).reward(given or prompt(), response, episode_id="g000001.0")).total


@pytest.mark.parametrize(
    ("config", "response", "expected"),
    [
        ({"expect": r"[0-9.]+"}, " 4.2\n", 1),
        ({"expect": r"[0-9.]+"}, "it is 4.2", 0),
        ({"expect": r"[0-9.]+", "match": "search"}, "it is 4.2", 1),
        ({"expect": r"(it is )?{answer}"}, "it is 4.2", 1),
        ({"expect": r"{answer}"}, "4x2", 0),
        ({"expect": r"yes"}, "YES", 0),
        ({"expect": r"yes", "ignore_case": True}, "YES", 1),
        ({"expect": r"{answer}", "pattern": r"<a>(.*?)</a>"}, "<a>1</a><a> 4.2 </a>", 1),
        ({"expect": r".*", "match": "search"}, "", 1),
    ],
)
def test_regex(config: dict[str, Any], response: str, expected: float) -> None:
    assert score(RegexReward(**config), response) == expected


def test_a_ground_truth_that_is_empty_is_an_error_at_start() -> None:
    with pytest.raises(RewardError, match=r"reward 'regex': prompt p7 has no ground truth to put in place of {answer}"):
        Rubric([RegexReward(expect="x{answer}")]).check_prompts([prompt(" ")])
    Rubric([RegexReward(expect="x")]).check_prompts([prompt("")])


@pytest.mark.parametrize("field", ["expect", "pattern"])
def test_what_is_no_expression_is_told_when_the_recipe_is_read(field: str) -> None:
    with pytest.raises(ValidationError, match="not a regular expression"):
        RegexReward(**{"expect": "x", field: "(a"})


def test_endless_backtracking_is_given_up_and_others_go_on() -> None:
    rubric = Rubric([RegexReward(expect="(a|aa)+$", seconds=0.05)])

    async def main() -> list[Any]:
        answers = [ENDLESS, "aaa", "b"]
        calls = [rubric.reward(prompt(), answer, episode_id=f"g000001.{n}") for n, answer in enumerate(answers)]
        return await asyncio.gather(*calls, return_exceptions=True)

    endless, right, wrong = asyncio.run(main())
    assert isinstance(endless, VerifierFailure)
    assert "was not done in 0.05 s of CPU time" in str(endless)
    assert (right.total, wrong.total) == (1.0, 0.0)


def test_a_component_s_own_pattern_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.rewards.rubric.EXTRACT_SECONDS", 0.05)
    with pytest.raises(VerifierFailure, match="backtracks too much"):
        score(ExactReward(pattern="(a|aa)+$"), ENDLESS)
