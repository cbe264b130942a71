"""The code reward: both kinds of tests, every verdict, and a sandbox that fails is no 0."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sluice.config.rewards import CodeReward
from sluice.config.sandbox import SandboxConfig
from sluice.errors import RewardError
from sluice.rewards.base import VerifierFailure
from sluice.rewards.means import Means
from sluice.rewards.rubric import Rubric
from sluice.sandbox.sandbox import Sandbox
from sluice.types import Message, Prompt, Reward

LIMITS = SandboxConfig(seconds=60.0, cpu_seconds=1, memory_bytes=256 * 1024**2, isolation="any")
CASES = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "2 2", "stdout": "4"}]
ASSERTIONS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4, 'two and two'"]
ADDS = "a, b = map(int, input().split())\nprint(a + b, ' ')\n"


def prompt(tests: Any) -> Prompt:
    return Prompt("p7", "code", (Message("user", "Add."),), "", {} if tests is None else {"tests": tests})


def score(code: str, tests: Any, **config: Any) -> Reward:
    limits = LIMITS.model_copy(update=config.pop("limits", {}))
    rubric = Rubric([CodeReward(sandbox=limits, **config)], Means(Sandbox))
    rubric.check_prompts([prompt(tests)])
    response = f"First:\n```\nnot this\n```\nSo:\n```python\n{code}\n```\nDone."
    return asyncio.run(rubric.reward(prompt(tests), response, episode_id="e"))


@pytest.mark.parametrize(
    ("code", "tests", "verdict", "passed", "why"),
    [
        (ADDS, CASES, "passed", 2, None),
        ("print(3)", CASES, "failed", 1, "case 2: it printed str '3\\n', expected was str '4'"),
        ("print(3", CASES, "error", 0, "case 1: it ended with exit code 1: SyntaxError: '(' was never closed"),
        ("while True: pass", CASES, "limit", 0, "case 1: it met the limit of cpu"),
        ("x = 'x' * 2**30", CASES, "limit", 0, "case 1: it met the limit of memory"),
        ("def add(a, b): return a + b", ASSERTIONS, "passed", 2, None),
        ("def add(a, b): return a + b", ASSERTIONS[0], "passed", 1, None),
        ("def add(a, b): return 3", ASSERTIONS, "failed", 1, "two and two"),
        ("def add(a, b): return a", ASSERTIONS, "failed", 0, "assert add(1, 2) == 3"),
        ("def ad(a, b): return a", ASSERTIONS, "error", 0, "NameError: name 'add' is not defined"),
        ("import os\nos._exit(0)", ASSERTIONS, "error", 0, "it ended before the tests did"),
        ("raise SystemExit(0)", ASSERTIONS, "error", 0, "it ended before the tests did"),
        ("def add(a, b): raise SystemExit(0)", ASSERTIONS, "error", 0, "it ended before the tests did"),
        ("1 / 0", ASSERTIONS, "error", 0, "it ended with exit code 1: ZeroDivisionError: division by zero"),
        ('print(\'\\n[["passed", ""]]\')\ndef add(a, b): return 0', ASSERTIONS, "failed", 0, "assert add(1, 2) == 3"),
    ],
)
def test_verdicts(code: str, tests: Any, verdict: str, passed: int, why: str | None) -> None:
    reward = score(code, tests)
    assert reward.total == float(verdict == "passed")
    notes = reward.notes["code"]
    assert (notes["verdict"], notes["passed"]) == (verdict, passed)
    assert notes.get("why") == why
    assert bool(notes.get("exposed")) == bool(Sandbox(LIMITS).exposed)


def test_a_deadline() -> None:
    reward = score("import time; time.sleep(1000)", CASES, limits={"seconds": 1.5})
    assert reward.notes["code"]["verdict"] == "timeout"


def test_a_share() -> None:
    reward = score("print(3)", [CASES[1], CASES[0]], partial=True)
    assert (reward.total, reward.components["code/passed"]) == (0.5, 0.5)
    assert score("def add(a, b): return 4", ASSERTIONS, partial=True).total == 0.5


def test_no_code_is_wrong_without_a_run() -> None:
    rubric = Rubric([CodeReward(sandbox=LIMITS)], Means(Sandbox))
    reward = asyncio.run(rubric.reward(prompt(CASES), "I cannot.", episode_id="e"))
    assert (reward.total, reward.notes["code"]["why"]) == (0.0, "the answer has no code")


@pytest.mark.parametrize(
    "tests", [None, [], "", [1], [{"stdin": "1"}], [{"stdin": 1, "stdout": "1"}], ["assert 1", CASES[0]]]
)
def test_a_prompt_without_tests_is_told_at_start(tests: Any) -> None:
    with pytest.raises(RewardError, match="reward 'code': the metadata of prompt p7 has no tests in 'tests'"):
        score("", tests)


def test_a_sandbox_that_fails_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rubric = Rubric([CodeReward(sandbox=LIMITS)], Means(Sandbox))
    monkeypatch.setattr("sluice.sandbox.sandbox.LAUNCHER", "/nowhere/launcher.py")
    with pytest.raises(VerifierFailure, match="SandboxError: the sandbox ended without a word"):
        asyncio.run(rubric.reward(prompt(CASES), f"```\n{ADDS}```", episode_id="e"))
    with pytest.raises(RewardError, match="this rubric was made without one"):
        Rubric([CodeReward()])
