"""Functions of the user's own as rewards: of one answer, or of all answers of a group."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, cast

from sluice.config.rewards import PythonGroupReward, PythonReward
from sluice.errors import ConfigError, RewardError
from sluice.plugins import load_object, signature_problem
from sluice.rewards.base import Submission, shown
from sluice.types import Prompt


class PythonVerifier:
    """Calls `(prompt, answer, **params)`.

    A plain function is called in the event loop's own thread: it should be quick, and it has no deadline,
    since Python cannot stop it. An async one is given up after `seconds`.
    """

    def __init__(self, config: PythonReward) -> None:
        self._function = _Function(config.path, ("prompt", "answer"), "float", config.params, config.seconds)

    def check(self, prompt: Prompt) -> None:
        """The function knows its prompts; nothing is checked before."""

    async def score(self, submission: Submission) -> float:
        """What the function returns.

        Raises:
            TimeoutError: an async function took longer than its deadline.
        """
        return await self._function(submission.prompt, submission.text)


class PythonGroupVerifier:
    """Calls `(prompt, answers, **params)` with all answers of a group, as `PythonVerifier` does with one."""

    def __init__(self, config: PythonGroupReward) -> None:
        self._function = _Function(config.path, ("prompt", "answers"), "list[float]", config.params, config.seconds)

    def check(self, prompt: Prompt) -> None:
        """The function knows its prompts; nothing is checked before."""

    async def compare(self, submissions: Sequence[Submission]) -> Sequence[float]:
        """What the function returns, one number for each answer.

        Raises:
            ValueError: it returned something else than a sequence.
            TimeoutError: an async function took longer than its deadline.
        """
        result = await self._function(submissions[0].prompt, [each.text for each in submissions])
        if isinstance(result, str | Mapping) or not hasattr(result, "__len__") or not hasattr(result, "__getitem__"):
            raise ValueError(f"it returned {shown(result)}, not a list of floats")
        return list(result)


class _Function:
    """A function of the user's own, checked when it is loaded."""

    def __init__(
        self, path: str, arguments: tuple[str, ...], returns: str, params: Mapping[str, Any], seconds: float
    ) -> None:
        expects = f"a function ({', '.join(arguments)}) -> {returns}"
        try:
            self._function = load_object(path, expects=expects)
        except ConfigError as error:
            raise RewardError(error.args[0], hint=error.hint) from error
        self._params = params
        self._seconds = seconds
        if inspect.isclass(self._function) or not callable(self._function):
            kind = "class" if inspect.isclass(self._function) else type(self._function).__name__
            raise RewardError(f"{path} is a {kind}, not {expects}", hint="name a function")
        problem = signature_problem(self._function, len(arguments), list(params))
        if problem:
            given = ", ".join([*arguments, *(f"{name}={value!r}" for name, value in params.items())])
            raise RewardError(
                f"{path} cannot be called as ({given}): {problem}",
                hint=f"define it as `def {path.rpartition(':')[2]}({', '.join(arguments)}, …) -> {returns}`, with "
                "`params` as keyword arguments",
            )

    async def __call__(self, *arguments: Any) -> Any:
        result = self._function(*arguments, **self._params)
        return await self._await(cast("Awaitable[Any]", result)) if inspect.isawaitable(result) else result

    async def _await(self, result: Awaitable[Any]) -> Any:
        task = asyncio.create_task(_run(result))
        try:
            # `wait` gives up even on a function that swallows its cancellation; `wait_for` would not.
            done, _ = await asyncio.wait({task}, timeout=self._seconds)
        finally:
            task.cancel()
        if not done:
            raise TimeoutError(f"took longer than {self._seconds:g} s")
        if task.cancelled():
            raise RuntimeError("cancelled itself")
        return task.result()


async def _run(result: Awaitable[Any]) -> Any:
    try:
        return await result
    except SystemExit as error:  # a task that raises it ends the event loop, and the run with it
        raise RuntimeError(f"SystemExit: {error.code}") from error
