"""1 when math-verify finds the answer equal to the ground truth."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import signal
from pathlib import Path
from typing import Any

from sluice.config.rewards import MathReward
from sluice.errors import RewardError
from sluice.rewards.base import Score, Submission
from sluice.rewards.means import Means
from sluice.rewards.workers import WorkerLost, Workers
from sluice.types import Prompt

SCRIPT = Path(__file__).with_name("math_worker.py")
WALL_SECONDS = 120.0
"""Deadline beside that of CPU time: for a machine so busy that the process gets none, and to import sympy."""


PLAIN_NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")
"""Fit for certain: most ground truths are, and reading thousands takes minutes."""


class MathVerifier:
    """Compares in helper processes, see `math_worker`.

    An answer on which math-verify does not end in time is wrong: its ground truth was read at start, so it is the
    answer that cannot be read. A process that fails otherwise is a failure of ours.
    """

    def __init__(self, config: MathReward, means: Means) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError("math-verify is not installed", hint="pip install 'sluice-rl[math]'")
        self._seconds = config.seconds
        self._workers = Workers(SCRIPT, config.workers)
        means.at_close(self._workers.close)
        self._fit: set[str] = set()

    def check(self, prompt: Prompt) -> None:
        """The ground truth must be an expression."""
        if prompt.answer in self._fit or PLAIN_NUMBER.fullmatch(prompt.answer):
            return
        try:
            said = self._ask(prompt.answer, None)
        except WorkerLost as error:
            said = {"unfit": f"math-verify {error}"}
        why = said.get("unfit") or said.get("error") or ("gave_up" in said and "math-verify does not end on it")
        if why:
            raise RewardError(
                f"the ground truth {prompt.answer!r} of prompt {prompt.id} cannot be compared: {why}",
                hint="write it as LaTeX between $ and $, use the reward type 'exact' for text, or limit this reward "
                "with `tasks`",
            )
        self._fit.add(prompt.answer)

    async def score(self, submission: Submission) -> Score:
        """1 or 0.

        Raises:
            RewardError: the ground truth is no expression, or math-verify failed.
            WorkerLost: the helper process failed.
        """
        try:
            said = await asyncio.to_thread(self._ask, submission.prompt.answer, submission.text)
        except WorkerLost as error:
            if error.code != -signal.SIGXCPU:
                raise
            said = {"gave_up": "ended by the kernel"}
        if "gave_up" in said:
            return Score(0.0, notes={"why": f"not read within {self._seconds:g} s of CPU time ({said['gave_up']})"})
        if "score" not in said:
            raise RewardError(f"math-verify failed: {said.get('unfit') or said.get('error')}")
        return Score(said["score"], notes={"why": said["why"]} if "why" in said else {})

    def _ask(self, truth: str, given: str | None) -> dict[str, Any]:
        return self._workers.ask({"truth": truth, "given": given, "seconds": self._seconds}, WALL_SECONDS)
