"""math-verify in helper processes: what is equal, what is unfit, and what does not end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.config.rewards import MathReward
from sluice.errors import RewardError
from sluice.rewards.base import VerifierFailure
from sluice.rewards.rubric import Rubric
from sluice.rewards.workers import WorkerLost, Workers
from sluice.types import Message, Prompt, Reward


@pytest.fixture(scope="module")
def rubric() -> Iterator[Rubric]:
    made = Rubric([MathReward(seconds=1.0, workers=1)])
    yield made
    asyncio.run(made.close())


def prompt(answer: str) -> Prompt:
    return Prompt("p7", "math", (Message("user", "?"),), answer)


def reward(rubric: Rubric, truth: str, response: str) -> Reward:
    return asyncio.run(rubric.reward(prompt(truth), response, episode_id="e"))


def test_equal_and_not(rubric: Rubric) -> None:
    for truth, response, score in (
        ("34", r"The answer is \boxed{34}.", 1),
        ("34", "so it is 35", 0),
        ("x^2+1", "$1+x^2$", 1),
        (r"\frac{1}{2}", "0.5", 1),
        ("(1,2)", "(1,2)", 1),
        ("(1,2)", "(2,1)", 0),
        ("1,234", "$1234$", 1),
        ("34", "", 0),
        ("34", "I do not know", 0),
    ):
        assert reward(rubric, truth, response).total == score, (truth, response)


def test_an_unfit_ground_truth_is_told_at_start_and_is_no_zero(rubric: Rubric) -> None:
    rubric.check_prompts([prompt("34"), prompt("x^2+1"), prompt(r"$\sin(x)$")])
    for unfit in ("", "blue", "sin(x)", r"\text{Tuesday}"):
        with pytest.raises(
            RewardError, match=r"reward 'math_verify': the ground truth .* of prompt p7 cannot be compared"
        ):
            rubric.check_prompts([prompt(unfit)])
        with pytest.raises(VerifierFailure, match="math-verify finds no expression"):
            reward(rubric, unfit, "1")


@pytest.mark.parametrize("endless", [r"$10^{10^{10^{10}}}$", r"$\sum_{n=1}^{1000000000} n!$"])
def test_an_answer_without_end_is_wrong_and_the_next_is_scored(rubric: Rubric, endless: str) -> None:
    given_up = reward(rubric, "34", endless)
    assert given_up.total == 0.0
    assert "not read within 1 s of CPU time" in given_up.notes["math_verify"]["why"]
    assert reward(rubric, "34", "34").total == 1.0


def test_workers_that_fail(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    if asked['do'] == 'die': os._exit(3)\n"
        "    if asked['do'] == 'complain': sys.exit('no sympy')\n"
        "    if asked['do'] == 'hang': time.sleep(1000)\n"
        "    print(json.dumps({'pid': os.getpid(), 'environment': sorted(os.environ)}), flush=True)\n"
    )
    workers = Workers(script, 1)
    first = workers.ask({"do": "answer"}, 60)
    assert workers.ask({"do": "answer"}, 60) == first, "the same process answers"
    assert "HOME" not in first["environment"]
    with pytest.raises(WorkerLost, match="ended with 3: no word"):
        workers.ask({"do": "die"}, 60)
    with pytest.raises(WorkerLost, match="ended with 1: no sympy"):
        workers.ask({"do": "complain"}, 60)
    with pytest.raises(WorkerLost, match="did not answer in time"):
        workers.ask({"do": "hang"}, 0.5)
    assert workers.ask({"do": "answer"}, 60)["pid"] != first["pid"]
    workers.close()
    workers.close()
