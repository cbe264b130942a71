"""Runs the code of an answer against tests, in a sandbox.

Two kinds of tests. Of a case, only the input enters the sandbox: the output is compared here, and the program cannot
know what was expected. An assertion runs in the interpreter that has just run the answer: code that is out to cheat can
look at the test, or change what `==` means.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

from sluice.config.rewards import CodeReward
from sluice.errors import RewardError
from sluice.rewards.base import CodeRan, Score, Submission, shown
from sluice.rewards.means import Means
from sluice.types import Prompt

HARNESS = """
def run(answer, tests, token):
    import json, os, sys, traceback
    out, names, results = os.dup(1), {"__name__": "__main__"}, []
    try:
        exec(compile(answer, "answer.py", "exec"), names)
        for test in tests:
            try:
                exec(compile(test, "test.py", "exec"), names)
            except AssertionError as error:
                results.append(["failed", str(error) or test])
            except Exception as error:
                results.append(["error", f"{type(error).__name__}: {error}"])
            else:
                results.append(["passed", ""])
        sys.stdout.flush()
    finally:
        os.write(out, f"\\n{token}{json.dumps(results)}\\n".encode())

"""
"""Runs an answer and then tests in the same names, and prints the token and what came of each."""


class Verdict(StrEnum):
    """What became of an answer's code; the first that is not `passed` counts."""

    PASSED = "passed"
    FAILED = "failed"
    ERROR = "error"
    TIMEOUT = "timeout"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class Tested:
    """One test: what came of it and, when it was not passed, why."""

    verdict: Verdict
    why: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """A program's input, and what it should print."""

    stdin: str
    stdout: str


class CodeVerifier:
    """1 when all tests pass, or the share that does."""

    def __init__(self, config: CodeReward, means: Means) -> None:
        self._config = config
        self._runner = means.sandbox(config.sandbox)

    def check(self, prompt: Prompt) -> None:
        """The prompt must have tests."""
        self._tests(prompt)

    async def score(self, submission: Submission) -> Score:
        """How the answer's code does in the tests of its prompt.

        Raises:
            SandboxError: the sandbox failed, not the code.
        """
        tests = self._tests(submission.prompt)
        if not submission.text:
            return Score(0.0, {"passed": 0.0}, {"verdict": Verdict.ERROR.value, "why": "the answer has no code"})
        if isinstance(tests[0], Case):
            results = await self._run_cases(submission.text, cast("Sequence[Case]", tests))
        else:
            results = await self._run_assertions(submission.text, cast("Sequence[str]", tests))
        passed = sum(result.verdict is Verdict.PASSED for result in results)
        share = passed / len(tests)
        first = next((result for result in results if result.verdict is not Verdict.PASSED), Tested(Verdict.PASSED))
        notes: dict[str, Any] = {"verdict": first.verdict.value, "passed": passed, "tests": len(tests)}
        if self._runner.exposed:
            notes["exposed"] = self._runner.exposed
        if first.why:
            notes["why"] = first.why
        return Score(share if self._config.partial else float(passed == len(tests)), {"passed": share}, notes)

    async def _run_cases(self, program: str, cases: Sequence[Case]) -> list[Tested]:
        """One run for each; after a failure only where the share counts."""
        results: list[Tested] = []
        for number, case in enumerate(cases, start=1):
            result = _judge_case(await self._runner.run(program, stdin=case.stdin), case)
            results.append(Tested(result.verdict, result.why and f"case {number}: {result.why}"))
            if result.verdict is not Verdict.PASSED and not self._config.partial:
                break
        return results

    async def _run_assertions(self, program: str, tests: Sequence[str]) -> list[Tested]:
        token = secrets.token_hex(16)
        ran = await self._runner.run(f"{HARNESS}run({program!r}, {list(tests)!r}, {token!r})\n")
        fault = _fault(ran)
        _, found, line = ran.stdout.rpartition(f"\n{token}")
        results = [Tested(Verdict(verdict), why) for verdict, why in json.loads(line)] if found else []
        if len(results) == len(tests) and not fault:
            return results
        why = fault or Tested(Verdict.ERROR, "it ended before the tests did")
        return [*results, *[why] * (len(tests) - len(results))] or [why]

    def _tests(self, prompt: Prompt) -> Sequence[Case | str]:
        key = self._config.tests
        found = prompt.metadata.get(key)
        tests = [found] if isinstance(found, str) else found
        if isinstance(tests, list | tuple) and tests:
            several = cast("Sequence[Any]", tests)
            if all(isinstance(each, str) and each.strip() for each in several):
                return several
            if all(_is_case(each) for each in several):
                return [Case(each["stdin"], each["stdout"]) for each in several]
        raise RewardError(
            f"the metadata of prompt {prompt.id} has no tests in {key!r}, but {shown(found)}",
            hint='give a list of {"stdin": …, "stdout": …}, or of assertions as strings; `tests` names the key',
        )


def _is_case(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    case = cast("Mapping[Any, Any]", value)
    return set(case) == {"stdin", "stdout"} and all(isinstance(each, str) for each in case.values())


def _fault(ran: CodeRan) -> Tested | None:
    """Why a program did not end well; None when it did."""
    last = ran.stderr.strip().rsplit("\n", 1)[-1][-500:]
    if ran.ending == "timeout":
        return Tested(Verdict.TIMEOUT, "it was not done at the deadline")
    if ran.ending == "limit":
        return Tested(Verdict.LIMIT, f"it met the limit of {ran.limit}")
    if ran.code:
        return Tested(Verdict.ERROR, f"it ended with exit code {ran.code}: {last}" if last else f"exit code {ran.code}")
    return None


def _judge_case(ran: CodeRan, case: Case) -> Tested:
    fault = _fault(ran)
    if fault is not None:
        return fault
    if _lines(ran.stdout) == _lines(case.stdout):
        return Tested(Verdict.PASSED)
    return Tested(Verdict.FAILED, f"it printed {shown(ran.stdout, 200)}, expected was {shown(case.stdout, 200)}")


def _lines(text: str) -> list[str]:
    """Lines without white space at their ends, and without empty ones at the end of the text."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
