"""Verifiers and the rubric. A verifier that fails is a failure, never a 0."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sluice.config.rewards import (
    ExactReward,
    GivenReward,
    NumericReward,
    PythonReward,
    RandomReward,
    RewardConfig,
)
from sluice.errors import RewardError
from sluice.rewards.base import VerifierFailure
from sluice.rewards.numeric import parse_number
from sluice.rewards.rubric import Rubric
from sluice.types import Message, Prompt, Reward


def prompt(answer: str = "42", task: str = "calc", **metadata: Any) -> Prompt:
    return Prompt("p7", task, (Message("user", "6 * 7 ="),), answer, metadata)


def reward(rubric: Rubric, given: Prompt, response: str, episode: str = "g000001.0") -> Reward:
    return asyncio.run(rubric.reward(given, response, episode_id=episode))


def score(config: RewardConfig, given: Prompt, response: str, episode: str = "g000001.0") -> float:
    return reward(Rubric([config]), given, response, episode).total


@pytest.fixture
def function(tmp_path: Path) -> Callable[..., PythonReward]:
    def write(body: str, **config: Any) -> PythonReward:
        file = tmp_path / f"reward_{abs(hash(body))}.py"
        file.write_text(f"import asyncio, math\nfrom fractions import Fraction\nimport numpy as np\n{body}\n")
        return PythonReward(path=f"{file}:score", **config)

    return write


# ── patterns ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "pattern, response, right",
    [
        ("", "  42\n", True),
        ("", "it is 42", False),
        (r"<a>(.*?)</a>", "<a>41</a> no, <a> 42 </a>", True),
        (r"<a>(.*?)</a>", "<a>42</a> no, <a>41</a>", False),
        (r"<a>(.*?)</a>", "42", False),
        (r"[0-9]+", "41 then 42", True),
        (r"(x)?42|(42)", "42", False),  # the first group took no part
    ],
)
def test_pattern_takes_the_last_match_and_its_first_group(pattern: str, response: str, right: bool) -> None:
    assert score(ExactReward(pattern=pattern), prompt(), response) == float(right)


def test_components_weights_and_tasks() -> None:
    rubric = Rubric(
        [
            ExactReward(name="answer"),
            ExactReward(name="format", pattern="(?s)^(.*)$", weight=0.5, ignore_case=True),
            ExactReward(name="other", tasks=("maze",)),
        ]
    )
    got = reward(rubric, prompt("Yes"), "yes")
    assert got.components == {"answer": 0.0, "format": 1.0}
    assert got.weights == {"answer": 1.0, "format": 0.5}
    assert got.total == 0.5


def test_check_names_the_task_without_component() -> None:
    rubric = Rubric([ExactReward(tasks=("maze",)), NumericReward(tasks=("chain_sum",))])
    rubric.check(["maze"])
    with pytest.raises(RewardError, match=r"no reward component applies to task 'calc'.*limited to chain_sum, maze"):
        rubric.check(["maze", "calc"])
    with pytest.raises(RewardError, match="no reward component applies to task 'calc'"):
        reward(rubric, prompt(), "42")
    with pytest.raises(RewardError, match=r"(?s)'numeric' is limited to task 'chain_sum'.*did you mean 'chain_sums'"):
        Rubric([ExactReward(), NumericReward(tasks=("chain_sum",))]).check(["chain_sums"], complete=True)
    with pytest.raises(RewardError, match="two reward components are called 'exact'"):
        Rubric([ExactReward(), ExactReward()])


# ── exact and numeric ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, value",
    [
        ("42", 42), (" -1.50 ", -1.5), ("1,234,567.5", 1234567.5), ("2e-3", 0.002), ("3/4", 0.75), ("-3 / -4", 0.75),
        (".5", 0.5), ("5.", 5), ("+7", 7), ("\N{MINUS SIGN}7", -7),
        ("", None), ("-", None), (".", None), ("e5", None), ("/", None), ("1/", None), ("1/0", None), ("nan", None),
        ("inf", None), ("1e999", None), ("1_000", None), ("12,34", None), ("4 2", None), ("0x10", None), ("٤٢", None),
        ("42 apples", None),
    ],
)  # fmt: skip
def test_parse_number(text: str, value: float | None) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "truth, answer, config, expected",
    [
        ("42", "42.0", NumericReward(), 1.0),
        ("42", "42.0001", NumericReward(), 0.0),
        ("42", "42.0001", NumericReward(rel_tol=1e-4), 1.0),
        ("0", "1e-10", NumericReward(), 1.0),
        ("1,000", "1000", NumericReward(), 1.0),
        ("1", "one", NumericReward(), 0.0),
        ("1", "", NumericReward(), 0.0),
    ],
)
def test_numeric(truth: str, answer: str, config: NumericReward, expected: float) -> None:
    assert score(config, prompt(truth), answer) == expected


def test_unfit_ground_truth_is_told_before_the_run_and_is_no_zero() -> None:
    with pytest.raises(RewardError, match="reward 'numeric': the ground truth 'blue' of prompt p7 is no number"):
        Rubric([NumericReward()]).check_prompts([prompt("blue")])
    with pytest.raises(RewardError, match="reward 'exact': prompt p7 has no ground truth"):
        Rubric([ExactReward()]).check_prompts([prompt(" ")])
    Rubric([ExactReward(tasks=("maze",)), NumericReward(), RandomReward()]).check_prompts([prompt("1")])
    for config in (NumericReward(), ExactReward()):
        with pytest.raises(VerifierFailure, match="prompt p7"):
            score(config, prompt(""), "")


# ── functions of the user's own ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "returned, expected",
    [("True", 1), ("False", 0), ("1", 1), ("0.25", 0.25), ("np.float32(0.5)", 0.5), ("np.int64(2)", 2),
     ("np.bool_(True)", 1), ("Fraction(1, 4)", 0.25), ("-3.5", -3.5)],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "async "])
def test_python_scores(function: Callable[..., PythonReward], prefix: str, returned: str, expected: float) -> None:
    config = function(f"{prefix}def score(prompt, answer): return {returned}")
    assert score(config, prompt(), "42") == expected


def test_python_gets_prompt_answer_and_params(function: Callable[..., PythonReward]) -> None:
    body = "def score(p, a, *, bonus, base=0): return base + bonus * (p.answer == a) + len(p.metadata)"
    config = function(body, params={"bonus": 3}, pattern=r"= (\d+)")
    assert score(config, prompt(extra=1), "x = 42") == 4


@pytest.mark.parametrize(
    "returned, said",
    [
        ("None", "returned NoneType None, which is no finite number"),
        ("'1.0'", "returned str '1.0', which is no finite number"),
        ("math.nan", "returned float nan, which is no finite number"),
        ("-math.inf", "returned float -inf"),
        ("10**400", "returned int 1000"),
        ("[1.0]", r"returned list \[1.0\]"),
        ("1j", "returned complex 1j"),
        ("np.ones(3)", "returned ndarray"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("exit(1)", "raised (RuntimeError: )?SystemExit: 1"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "async "])
def test_a_failing_verifier_is_named_and_is_never_zero(
    function: Callable[..., PythonReward], prefix: str, returned: str, said: str
) -> None:
    config = function(f"{prefix}def score(prompt, answer): return {returned}", name="mine")
    with pytest.raises(VerifierFailure, match=f"reward 'mine' of prompt p7 {said}") as caught:
        score(config, prompt(), "42")
    assert (caught.value.component, caught.value.prompt_id) == ("mine", "p7")
    assert ("raised" in said) == (caught.value.__cause__ is not None)


@pytest.mark.parametrize(
    "body",
    [
        "async def score(prompt, answer): await asyncio.Event().wait()",
        "async def score(prompt, answer):\n"
        "    while True:\n"
        "        try:\n"
        "            await asyncio.sleep(30)\n"
        "        except asyncio.CancelledError:\n"
        "            return 1.0\n",
    ],
    ids=["hangs", "swallows its cancellation"],
)
def test_deadline(function: Callable[..., PythonReward], body: str) -> None:
    with pytest.raises(VerifierFailure, match=r"raised TimeoutError: took longer than 0\.05 s"):
        score(function(body, seconds=0.05), prompt(), "42")


def test_cancelling_the_caller_cancels_the_function(function: Callable[..., PythonReward]) -> None:
    body = (
        "state = []\n"
        "async def score(prompt, answer):\n"
        "    prompt.metadata['started'].set()\n"
        "    try:\n"
        "        await asyncio.Event().wait()\n"
        "    finally:\n"
        "        prompt.metadata['ended'].set()\n"
    )
    rubric = Rubric([function(body)])

    async def run() -> None:
        started, ended = asyncio.Event(), asyncio.Event()
        given = prompt(started=started, ended=ended)
        task = asyncio.create_task(rubric.reward(given, "42", episode_id="e"))
        await asyncio.wait_for(started.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(ended.wait(), 10)

    asyncio.run(run())


@pytest.mark.parametrize(
    "body, config, said",
    [
        ("def scores(p, a): return 1", {}, "has no 'score'.*did you mean 'scores'"),
        ("def score(p): return 1", {}, r"cannot be called as \(prompt, answer\): too many positional.*it is \(p\)"),
        ("def score(p, a, *, tol): return 1", {}, "missing a required argument: 'tol'"),
        ("def score(p, a, tol=1): return 1", {"params": {"tl": 1}}, "unexpected keyword argument 'tl'.*mean 'tol'"),
        ("score = 3", {}, "is a int, not a function"),
        ("class score:\n    def __init__(self, p, a): ...", {}, "is a class, not a function"),
        ("score = max", {}, "signature cannot be read"),
        ("1 / 0", {}, "importing .* failed: ZeroDivisionError"),
    ],
)
def test_misconfiguration_is_told_at_construction(
    function: Callable[..., PythonReward], body: str, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(RewardError, match=f"(?s){said}") as caught:
        Rubric([function(body, **config)])
    assert caught.value.hint


# ── the coin ────────────────────────────────────────────────────────────────────────────────────────────


def test_random_depends_on_episode_and_seed_alone() -> None:
    ids = [f"g{n:06d}.{k}" for n in range(500) for k in range(8)]

    def draws(given: Prompt, response: str, **config: Any) -> list[float]:
        rubric = Rubric([RandomReward(**config)])

        async def all_of_them() -> list[float]:
            return [(await rubric.reward(given, response, episode_id=each)).total for each in ids]

        return asyncio.run(all_of_them())

    first = draws(prompt(), "42")
    assert first == draws(prompt("other", task="else"), "another text")
    assert first != draws(prompt(), "42", seed=1)
    assert set(first) == {0.0, 1.0}
    for probability in (0.5, 0.1, 0.9):
        mean = sum(draws(prompt(), "", probability=probability)) / len(ids)
        assert abs(mean - probability) < 4 * math.sqrt(probability * (1 - probability) / len(ids))
    assert set(draws(prompt(), "", probability=0.0)) == {0.0}
    assert set(draws(prompt(), "", probability=1.0)) == {1.0}


# ── given ───────────────────────────────────────────────────────────────────────────────────────────────


def given(config: GivenReward, info: dict[str, Any]) -> float:
    return asyncio.run(Rubric([config]).reward(prompt(), "text", episode_id="g000001.0", info=info)).total


def test_a_given_reward_is_what_was_given() -> None:
    info = {"rewards": {"reward": 0.25, "style": 1}}
    assert given(GivenReward(), info) == 0.25
    assert given(GivenReward(component="style", weight=2.0), info) == 2.0
    assert given(GivenReward(default=0.5), {}) == 0.5


@pytest.mark.parametrize(
    ("config", "info", "why"),
    [
        (GivenReward(), {}, "nothing was given"),
        (GivenReward(), {"rewards": {"style": 1.0}}, "given were style"),
        (GivenReward(default=0.0), {"rewards_missing": "verify ended with exit code 1"}, "verify ended with exit code"),
        (GivenReward(), {"rewards": {"reward": math.inf}}, "no finite number"),
        (GivenReward(), {"rewards": {"reward": "1"}}, "no finite number"),
    ],
)
def test_what_nobody_gave_is_a_failure(config: GivenReward, info: dict[str, Any], why: str) -> None:
    with pytest.raises(VerifierFailure, match=why):
        given(config, info)


def test_a_given_reward_reads_no_text() -> None:
    with pytest.raises(ValidationError, match="reads no text"):
        GivenReward(pattern="x")
