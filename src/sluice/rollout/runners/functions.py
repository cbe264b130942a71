"""Typed Python functions as tools: their JSON schema, and calls that always come back with a text."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

from pydantic import PydanticUserError, TypeAdapter, ValidationError, validate_call
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from pydantic_core import to_json

from sluice.errors import ConfigError
from sluice.nearest import did_you_mean
from sluice.plugins import load_object
from sluice.rollout.chat.base import ToolCall, ToolSpec

EXPECTS = "a typed function with a docstring, as a tool"


class Function:
    """One tool.

    Name, description and parameters are those of the function: `__name__`, the docstring, the annotations.
    A parameter is described by `Annotated[int, pydantic.Field(description="…")]`.

    Raises:
        ConfigError: it is no function that a model could be told about.
    """

    def __init__(self, path: str) -> None:
        function = load_object(path, expects=EXPECTS)
        if not inspect.isfunction(function):
            raise ConfigError(f"{path} is a {type(function).__name__}, not {EXPECTS}", hint="name a function")
        self.name = function.__name__
        description = inspect.getdoc(function)
        if not description:
            raise ConfigError(f"the tool {path} has no docstring", hint="it is what the model is told about the tool")
        untyped = [each.name for each in inspect.signature(function).parameters.values() if _untyped(each)]
        if untyped:
            raise ConfigError(f"the tool {path} has no type for {untyped[0]!r}", hint=f"annotate it: {untyped[0]}: int")
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, function))
            schema = adapter.json_schema()
            self._call: Callable[..., Any] = validate_call(function)
        except (PydanticUserError, PydanticSchemaGenerationError, PydanticUndefinedAnnotation) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"the tool {path} has no JSON schema: {reason}", hint="use plain types") from error
        if schema.get("type") != "object":
            raise ConfigError(
                f"the tool {path} has positional-only parameters; a model names its arguments", hint="drop the `/`"
            )
        self._is_async = inspect.iscoroutinefunction(function)
        self.spec: ToolSpec = {
            "type": "function",
            "function": {"name": self.name, "description": description, "parameters": schema},
        }

    async def __call__(self, arguments: dict[str, Any], seconds: float) -> str:
        """What the model is told: the result as text or JSON, or `error: …`.

        A plain function runs in a thread of its own. Python cannot stop it: one that misses its deadline goes on,
        and what it returns is thrown away.
        """
        job = asyncio.ensure_future(self._call(**arguments) if self._is_async else _in_thread(self._call, arguments))
        try:
            done, _ = await asyncio.wait({job}, timeout=seconds)
        finally:
            job.cancel()
        if not done:
            return f"error: {self.name} took longer than {seconds:g} s"
        if job.cancelled():
            return f"error: {self.name} was cancelled"
        error = job.exception()
        if isinstance(error, ValidationError):
            return f"error: {_fault(error)}"
        if error is not None:
            return f"error: {type(error).__name__}: {error}"
        return as_text(job.result())


class Toolbox:
    """The tools of a run, by name.

    Args:
        paths: `file.py:name` or `module:name`.
        seconds: deadline of one call.
    """

    def __init__(self, paths: Sequence[str], *, seconds: float) -> None:
        functions = [Function(path) for path in paths]
        self._functions = {function.name: function for function in functions}
        self._seconds = seconds
        if len(self._functions) < len(functions):
            names = [function.name for function in functions]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"two tools are called {twice!r}", hint="rename one of the functions")
        self.specs: tuple[ToolSpec, ...] = tuple(function.spec for function in functions)

    async def call(self, call: ToolCall) -> str:
        """The result of a call as the model wrote it. What is wrong with it is the result."""
        function = self._functions.get(call.name)
        if function is None:
            hint = did_you_mean(call.name, self._functions)
            return f"error: there is no tool {call.name!r}; {hint}"
        try:
            arguments = json.loads(call.arguments or "{}")
        except json.JSONDecodeError as error:
            return f"error: the arguments are no JSON: {error}"
        if not isinstance(arguments, dict):
            return "error: the arguments are no JSON object"
        return await function(arguments, self._seconds)  # pyright: ignore[reportUnknownArgumentType]


def as_text(value: Any) -> str:
    """Text as it is, anything else as JSON; what JSON cannot hold as its `str`."""
    return value if isinstance(value, str) else to_json(value, fallback=str, inf_nan_mode="constants").decode()


def _untyped(parameter: inspect.Parameter) -> bool:
    return parameter.annotation is parameter.empty


def _fault(error: ValidationError) -> str:
    """The first faults in words: `b: Missing required argument`."""
    faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)[:3]]
    return "; ".join(faults)


async def _in_thread(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call in a daemon thread, so that a function that never returns blocks neither other calls nor the exit."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not result.done():
            set_it(value)

    def work() -> None:
        try:
            value = function(**arguments)
        except SystemExit as error:
            outcome = (result.set_exception, RuntimeError(f"SystemExit: {error.code}"))
        except Exception as error:  # noqa: BLE001 - handed to the caller, who tells the model
            outcome = (result.set_exception, error)
        else:
            outcome = (result.set_result, value)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name=f"tool-{getattr(function, '__name__', '')}", daemon=True).start()
    return await result
