"""Prompts from a function of the user's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

from sluice.config.data import PythonSource
from sluice.data.sources.rows import check_text
from sluice.errors import ConfigError, DataError
from sluice.plugins import describe, load_object, signature_problem
from sluice.types import Message, Prompt

MAX_ITEMS = 10_000_000
"""More than this is taken for a generator without end: the prompts of a run are held in memory."""


def load(config: PythonSource) -> list[Prompt]:
    """Every prompt that the function yields.

    Raises:
        ConfigError: the function is missing or does not take the parameters.
        DataError: it raised, or yielded nothing, something else, or one id twice.
    """
    prompts: list[Prompt] = []
    places: dict[str, int] = {}
    for number, item in enumerate(items(config.path, [], config.params, "an iterable of Prompt"), start=1):
        place = f"item {number} of {config.path}"
        prompt = check_prompt(item, place)
        if prompt.id in places:
            raise DataError(
                f"items {places[prompt.id]} and {number} of {config.path} have the same id {prompt.id!r}",
                hint="an id names one task instance; leave repetition to the sampling strategy",
            )
        places[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{config.path} yielded no prompt", hint="yield sluice.types.Prompt objects")
    return prompts


def items(path: str, args: Sequence[Any], params: Mapping[str, Any], returns: str) -> Iterator[Any]:
    """What the function at `path` yields when it is called with `args` and `params`.

    Raises:
        ConfigError: no such function, or it cannot be called so.
        DataError: it raised, returned no iterable, or does not end.
    """
    function = load_object(path, expects=f"a function that returns {returns}")
    if not callable(function):
        raise ConfigError(f"{path} is a {type(function).__name__}, not a function that returns {returns}")
    problem = signature_problem(function, len(args), list(params))
    if problem:
        raise ConfigError(
            f"{path} cannot be called with {len(args)} arguments and params {sorted(params)}: {problem}",
            hint="`params` are passed as keyword arguments",
        )
    number = 0
    try:
        result = function(*args, **params)
        if not isinstance(result, Iterable) or isinstance(result, str | Mapping):
            returned = cast("object", result)
            raise DataError(
                f"{path} returned a {type(returned).__name__}, not {returns}", hint="return a list, or yield"
            )
        for number, item in enumerate(islice(cast("Iterable[Any]", result), MAX_ITEMS + 1), start=1):
            if number > MAX_ITEMS:
                raise DataError(f"{path} yielded more than {MAX_ITEMS} items", hint="it must come to an end")
            yield item
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} raised after {number} items: {describe(error)}", hint="mend the function") from error


def check_prompt(item: object, place: str) -> Prompt:
    """`item` as a Prompt that can be rendered and logged.

    Raises:
        DataError: it is none.
    """
    if not isinstance(item, Prompt):
        raise DataError(
            f"{place} is a {type(item).__name__}, not a Prompt",
            hint='build sluice.types.Prompt(id, task, (Message("user", "…"),), answer)',
        )
    given = cast("object", item.messages)
    is_tuple = isinstance(given, tuple) and bool(cast("tuple[Any, ...]", given))
    if not is_tuple or not all(isinstance(each, Message) for each in cast("tuple[object, ...]", given)):
        raise DataError(f"{place}: messages must be a tuple of Message, at least one", hint="see sluice.types.Prompt")
    texts: list[tuple[str, object]] = [("id", item.id), ("task", item.task), ("answer", item.answer)]
    texts += [("message", text) for message in item.messages for text in message]
    for name, text in texts:
        problem = check_text(text) if isinstance(text, str) else f"is a {type(text).__name__}, not a string"
        if not problem and not text and name in ("id", "task"):
            problem = "is empty"
        if problem:
            raise DataError(f"{place}: the {name} {problem}", hint="see sluice.types.Prompt")
    try:
        json.dumps(dict(item.metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{place}: its metadata cannot be written to the log: {error}",
            hint="metadata is JSON: strings, numbers, lists and dictionaries",
        ) from error
    return item
