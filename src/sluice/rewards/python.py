"""A function of the user's own as a reward."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from typing import Any, cast

from sluice.config.rewards import PythonReward
from sluice.errors import ConfigError, RewardError
from sluice.plugins import load_object, signature_problem
from sluice.types import Prompt


class PythonVerifier:
    """Calls `(prompt, answer, **params)`.

    A plain function is called in the event loop's own thread: it should be quick, and it has no deadline,
    since Python cannot stop it. An async one is given up after `seconds`.
    """

    def __init__(self, config: PythonReward) -> None:
        expects = "a function (prompt, answer) -> float"
        try:
            self._function = load_object(config.path, expects=expects)
        except ConfigError as error:
            raise RewardError(error.args[0], hint=error.hint) from error
        self._params = config.params
        self._seconds = config.seconds
        if inspect.isclass(self._function) or not callable(self._function):
            kind = "class" if inspect.isclass(self._function) else type(self._function).__name__
            raise RewardError(f"{config.path} is a {kind}, not {expects}", hint="name a function")
        problem = signature_problem(self._function, 2, list(self._params))
        if problem:
            with_params = "".join(f", {name}={value!r}" for name, value in self._params.items())
            raise RewardError(
                f"{config.path} cannot be called as (prompt, answer{with_params}): {problem}",
                hint=f"define it as `def {config.path.rpartition(':')[2]}(prompt, answer, …) -> float`, with "
                "`params` as keyword arguments",
            )

    def check(self, prompt: Prompt) -> None:
        """The function knows its prompts; nothing is checked before."""

    async def score(self, prompt: Prompt, answer: str, *, episode_id: str) -> float:
        """What the function returns.

        Raises:
            TimeoutError: an async function took longer than its deadline.
        """
        result = self._function(prompt, answer, **self._params)
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
