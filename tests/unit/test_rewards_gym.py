"""reasoning-gym as a reward: the answer key, the passage through the log, answers that are code."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sluice import gym
from sluice.config.data import ReasoningGymSource
from sluice.config.rewards import ReasoningGymReward
from sluice.data.sources import load_prompts
from sluice.errors import RewardError
from sluice.rewards.base import VerifierFailure
from sluice.rewards.rubric import Rubric
from sluice.rewards.screen import is_harmless
from sluice.types import Message, Prompt, Reward


def reward(rubric: Rubric, given: Prompt, response: str) -> Reward:
    return asyncio.run(rubric.reward(given, response, episode_id="g000001.0"))


def score(config: ReasoningGymReward, given: Prompt, response: str) -> float:
    return reward(Rubric([config]), given, response).total


def prompt(**metadata: Any) -> Prompt:
    return Prompt("p7", "calc", (Message("user", "6 * 7 ="),), "42", metadata)


DATASETS = [
    "chain_sum", "basic_arithmetic", "gcd", "decimal_arithmetic", "spiral_matrix", "countdown", "sokoban",
    "simple_integration", "polynomial_multiplication", "binary_matrix", "n_queens", "puzzle24", "knights_knaves",
    "string_insertion", "zebra_puzzles", "prime_factorization", "arc_1d", "rearc", "polynomial_equations",
]  # fmt: skip


def from_the_log(given: Prompt) -> Prompt:
    """The prompt after a passage through JSON."""
    metadata = json.loads(json.dumps(dict(given.metadata), allow_nan=False))
    return Prompt(given.id, given.task, given.messages, given.answer, metadata)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_answer_key_scores_one_and_a_wrong_answer_does_not(dataset: str) -> None:
    rubric = Rubric([ReasoningGymReward()])
    for given in load_prompts(ReasoningGymSource(dataset=dataset, size=3, seed=5)):
        rubric.check_prompts([given])
        for each in (given, from_the_log(given)):
            assert reward(rubric, each, given.answer).total == 1.0
            for wrong in ("", "no idea", "((((", "[x, y", "-"):
                assert reward(rubric, each, wrong).total <= 0.05


NO_KEY = frozenset({"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"})
"""Datasets whose entries have many right answers and name none."""


@pytest.mark.slow
def test_every_dataset_scores_alike_after_the_log_and_never_fails() -> None:
    from reasoning_gym.factory import DATASETS

    rubric = Rubric([ReasoningGymReward()])
    for dataset in sorted(DATASETS.keys() - {"composite"}):
        for given in load_prompts(ReasoningGymSource(dataset=dataset, size=2, seed=1)):
            again = from_the_log(given)
            for answer in (given.answer, "(((", "1e999999", "9**9**9", "null", "[]"):
                total = reward(rubric, given, answer).total
                assert total == reward(rubric, again, answer).total, (dataset, answer)
            assert reward(rubric, given, given.answer).total == 1.0 or dataset in NO_KEY, dataset


def test_threshold_and_params_travel_with_the_prompt() -> None:
    config = ReasoningGymReward(threshold=0.99)
    given = load_prompts(ReasoningGymSource(dataset="countdown", size=1, params={"min_numbers": 2}))[0]
    assert given.metadata[gym.KEY]["params"] == {"min_numbers": 2}
    assert score(ReasoningGymReward(), given, "1") == 0.05
    assert score(config, given, "1") == 0.0
    assert score(config, given, given.answer) == 1.0


def test_prompts_from_elsewhere_are_refused() -> None:
    rubric = Rubric([ReasoningGymReward()])
    with pytest.raises(RewardError, match=r"(?s)reward 'reasoning_gym': prompt p7 of task 'calc' does not come.*→"):
        rubric.check_prompts([prompt()])
    unknown = prompt(reasoning_gym={"dataset": "chain_sums", "entry": {"answer": "1"}})
    with pytest.raises(RewardError, match=r"(?s)no dataset 'chain_sums'.*did you mean 'chain_sum'\?"):
        rubric.check_prompts([unknown])
    with pytest.raises(VerifierFailure, match="no dataset 'chain_sums'"):
        reward(rubric, unknown, "1")


def test_a_broken_entry_is_a_failure_and_an_unreadable_answer_is_wrong() -> None:
    given = load_prompts(ReasoningGymSource(dataset="prime_factorization", size=1))[0]
    assert score(ReasoningGymReward(), given, "two times three") == 0.0, "its scorer raises on such an answer"
    held = {**given.metadata[gym.KEY], "entry": {"metadata": {}}}
    broken = prompt(reasoning_gym=held)
    with pytest.raises(VerifierFailure, match="raised KeyError: 'answer'"):
        score(ReasoningGymReward(), broken, "5")


@pytest.mark.parametrize("value", [1, "a", None, True, 0.5, [1, (2, (3,))], {1: "a", "b": (1, None)}, {"__py__": 1}])
def test_entries_survive_json(value: Any) -> None:
    back = gym.decode(json.loads(json.dumps(gym.encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_entries_of_other_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match=r"a builtins\.object cannot be kept in the log"):
        gym.encode({"a": [object()]})


@pytest.mark.parametrize(
    "dataset, answer",
    [
        ("spiral_matrix", '[entry["answer"]]'),
        ("string_insertion", "oracle_answer"),
        ("binary_matrix", "9**9**9"),
        ("n_queens", "__import__('os').getcwd()"),
        ("countdown", "1e999999"),
        ("puzzle24", "9**9**9"),
        ("puzzle24", "True + 23"),
        ("countdown", "__import__('pathlib').Path('hacked').touch()"),
        ("simple_integration", "exec('1')"),
        ("simple_integration", "X.__class__"),
        ("intermediate_integration", "((9**9)**9)**9"),
        ("intermediate_integration", "9**X"),
        ("polynomial_multiplication", "[x for x in y]"),
        ("polynomial_multiplication", "(" * 500),
        ("spiral_matrix", "[" * 900),
    ],
)
def test_an_answer_that_would_run_as_code_is_never_shown_to_the_scorer(dataset: str, answer: str) -> None:
    given = load_prompts(ReasoningGymSource(dataset=dataset, size=1))[0]
    assert not is_harmless(dataset, answer, given.metadata[gym.KEY]["entry"])
    assert score(ReasoningGymReward(), given, answer) == score(ReasoningGymReward(), given, "")


@pytest.mark.parametrize(
    "dataset, answer",
    [
        ("simple_integration", "3*X**2/2 - exp(-X)*sin(2*X) + C"),
        ("polynomial_multiplication", "-10*x**5 + 2.5*y**3 - (x + 1)**2"),
        ("countdown", "(3 + 4) * 7.5 - 2 / 1"),
        ("spiral_matrix", "[1, 2, 3]"),
        ("chain_sum", "__import__('os')"),  # its scorer compares text
    ],
)
def test_answers_of_the_right_form_are_shown(dataset: str, answer: str) -> None:
    assert is_harmless(dataset, answer, {"answer": "0"})
