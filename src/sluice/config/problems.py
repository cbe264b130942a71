"""What is wrong with a recipe, in words: key, fault, nearest valid name, place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sluice.config.lines import Key
from sluice.config.run import RunConfig
from sluice.config.shape import Spot, dotted, known_keys, locate, part_named, parts_of, tag_of
from sluice.errors import ConfigError
from sluice.nearest import nearest

_SHOWN = 60
"""Characters of a wrong value that are shown."""
_QUOTED = re.compile(r"'([^']*)'")
_WORD = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*")


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a recipe."""

    key: Key
    what: str
    place: str

    def __str__(self) -> str:
        text = f"{dotted(self.key)}: {self.what}" if self.key else self.what
        return f"{text}  [{self.place}]"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a recipe were written: a file and line, a function, an override, a flag."""

    known: Mapping[Key, str]

    def of(self, key: Key) -> str:
        """Place of `key`, or of the nearest table around it."""
        while key not in self.known and key:
            key = key[:-1]
        return self.known[key]


def refuse(name: str, problems: list[Problem]) -> ConfigError:
    """The error that lists every problem of the recipe `name`."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(f"{name} has {count}{lines}", hint="`sluice config schema` describes every key")


def problems_of(error: ValidationError, places: Places) -> list[Problem]:
    """Every fault that validation found, in the order of the configuration.

    Python code builds parts on their own: their keys start at the class, `OptimizerConfig.lr`.
    """
    details = error.errors(include_url=False)
    real = [one for one in details if not _is_echo(one, details)]
    found = [_problem(one, places, error.title) for one in real]
    if error.title == RunConfig.__name__:
        return found
    return [replace(problem, key=(error.title, *problem.key)) for problem in found]


def _is_echo(one: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """True for the length of a list that is too short only because its items are wrong."""
    at = one["loc"]
    return one["type"] == "too_short" and any(other["loc"][: len(at)] == at != other["loc"] for other in details)


def _problem(details: ErrorDetails, places: Places, title: str) -> Problem:
    spot = locate(details["loc"], part_named(title))
    key, kind = spot.key, details["type"]
    context: Mapping[str, Any] = details.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(key, _unknown_key(spot, places), places.of(key))
    if kind == "union_tag_invalid":
        key = (*key, "type")
        valid = _QUOTED.findall(str(context["expected_tags"]))
        return Problem(key, _not_one_of(context["tag"], valid), places.of(key))
    if kind == "union_tag_not_found":
        tags = [tag_of(part) for part in parts_of(spot.annotation)]
        return Problem((*key, "type"), f"missing; one of {', '.join(tags)}", places.of(key))
    if kind == "value_error":
        message = details["msg"].removeprefix("Value error, ")
        return Problem(key, message, _place_of_message(message, key, places))
    return Problem(key, _wrong_value(details, spot, context), places.of(key))


def _unknown_key(spot: Spot, places: Places) -> str:
    key, owner = spot.key, spot.owner
    valid = [] if owner is None else list(owner.model_fields)
    word = str(key[-1])
    meant = _same_name(key, below=True) or nearest(word, valid) or _same_name(key)
    text = "unknown key"
    if meant is not None:
        text += f", did you mean {meant!r}?"
    if valid:
        text += f" Valid here: {', '.join(valid)}" if meant else f", valid here: {', '.join(valid)}"
    chosen_at = places.known.get((*key[:-1], "type"), "")
    if owner is not None and chosen_at.startswith("override") and places.of(key) != chosen_at:
        text += f" (the keys of type {tag_of(owner)!r}, chosen by {chosen_at})"
    return text


def _same_name(key: Key, *, below: bool = False) -> str | None:
    """The key of this name that stands nearest in the configuration: `train.lr` → `train.optimizer.lr`; with `below`
    only one further down in the same table."""

    def distance(other: Key) -> tuple[int, int]:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(key, other, strict=False)))
        return -shared, len(other)

    table = key[:-1] if below else ()
    known = [each for each in known_keys() if each[-1] == key[-1] and each != key and each[: len(table)] == table]
    return dotted(min(known, key=distance)) if known else None


def _wrong_value(details: ErrorDetails, spot: Spot, context: Mapping[str, Any]) -> str:
    kind, given = details["type"], details["input"]
    if kind == "missing":
        field = spot.owner.model_fields.get(str(spot.key[-1])) if spot.owner else None
        description = (field.description or "") if field else ""
        return f"missing ({description.rstrip('.')})" if description else "missing"
    if kind in ("literal_error", "enum"):
        return _not_one_of(given, _QUOTED.findall(str(context["expected"])))
    if kind == "string_pattern_mismatch" and spot.key[-1] == "path":
        return f"must be 'file.py:name' or 'package.module:name', not {_shown(given)}"
    message = re.sub(r"^(Input|String|Tuple|Value|List|Dictionary) should", "must", details["msg"])
    message = re.sub("must be a valid dictionary or .*", "must be a table", message)
    message = re.sub(", unable to parse string as an? [a-z]+$", "", message)
    message = re.sub(" after validation, not [0-9]+$", "", message)
    return f"{message[0].lower()}{message[1:]}, not {_shown(given)}"


def _not_one_of(given: object, valid: list[str]) -> str:
    meant = nearest(str(given), valid)
    guess = f"did you mean {meant!r}? " if meant is not None else ""
    return f"{_shown(given)} is not valid, {guess}{'Valid' if guess else 'valid'}: {', '.join(valid)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _place_of_message(message: str, key: Key, places: Places) -> str:
    """Validators over several keys name them in their message: the first that the recipe set is the place."""
    for word in _WORD.findall(message):
        if "." not in word and "_" not in word:
            continue
        steps: Key = tuple(int(step) if step.isdecimal() else step for step in word.split("."))
        for candidate in (steps, (*key, *steps), (*key[:-1], *steps)):
            if candidate in places.known:
                return places.known[candidate]
    return places.of(key)
