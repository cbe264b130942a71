"""What is wrong with a recipe, in words: key, fault, nearest valid name, place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sluice.config.base import Part
from sluice.config.data import IMPORT_PATTERN
from sluice.config.lines import Key
from sluice.config.shape import (
    Table,
    dotted,
    known_keys,
    locate,
    nearest,
    parts_of,
    tag_of,
)
from sluice.errors import ConfigError

_LISTED = 16
"""Valid names are listed when there are at most this many."""
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
    """Every fault that validation found, in the order of the configuration."""
    return [_problem(details, places) for details in error.errors(include_url=False)]


def _problem(details: ErrorDetails, places: Places) -> Problem:
    key, owner = locate(details["loc"])
    kind = details["type"]
    if kind == "extra_forbidden":
        return Problem(key, _unknown_key(key, owner, places), places.of(key))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_tag(key, details, places)
    if kind == "value_error":
        message = details["msg"].removeprefix("Value error, ")
        return Problem(key, message, _place_of_message(message, key, places))
    return Problem(key, _wrong_value(details, key, owner), places.of(key))


def _unknown_key(key: Key, owner: type[Part] | None, places: Places) -> str:
    valid = [] if owner is None else list(owner.model_fields)
    word = str(key[-1])
    parts = ["unknown key"]
    meant = nearest(word, valid)
    if meant is not None:
        parts.append(f"did you mean {meant!r}?")
    elsewhere = [dotted(known) for known in dict.fromkeys(known_keys()) if known[-1] == word]
    if meant is None and elsewhere:
        parts.append(f"did you mean {elsewhere[0]!r}?")
    if len(valid) <= _LISTED and valid:
        parts.append(f"valid here: {', '.join(valid)}")
    chosen_at, place = places.known.get((*key[:-1], "type")), places.of(key)
    if owner is not None and tag_of(owner) and chosen_at not in (None, place):
        parts.append(f"these are the keys of type {tag_of(owner)!r}, chosen by {chosen_at}")
    return "; ".join(parts)


def _wrong_tag(key: Key, details: ErrorDetails, places: Places) -> Problem:
    context: Mapping[str, Any] = details.get("ctx", {})
    if details["type"] == "union_tag_invalid":
        key = (*key, "type")
        valid = _QUOTED.findall(str(context["expected_tags"]))
        return Problem(key, _not_one_of(str(context["tag"]), valid), places.of(key))
    valid = [tag for tag in (tag_of(part) for part in _options(details["loc"])) if tag]
    return Problem((*key, "type"), f"missing; one of {', '.join(valid)}", places.of(key))


def _options(loc: tuple[int | str, ...]) -> list[type[Part]]:
    """The members of the union at a location."""
    from sluice.config.shape import annotation_at

    return parts_of(annotation_at(loc))


def _wrong_value(details: ErrorDetails, key: Key, owner: type[Part] | None) -> str:
    kind, given = details["type"], details["input"]
    context: Mapping[str, Any] = details.get("ctx", {})
    if kind == "missing":
        field = owner.model_fields.get(str(key[-1])) if owner else None
        description = (field.description or "") if field else ""
        return f"missing ({description.rstrip('.')})" if description else "missing"
    if kind in ("literal_error", "enum"):
        return _not_one_of(given, _QUOTED.findall(str(context["expected"])))
    if kind == "string_pattern_mismatch" and context["pattern"] == IMPORT_PATTERN:
        return f"must be 'file.py:name' or 'package.module:name', not {_shown(given)}"
    message = details["msg"].replace("Input should be", "must be").replace("String should", "must")
    message = message.replace("Tuple should", "must").replace("Value should", "must")
    return f"{message[0].lower()}{message[1:]}, not {_shown(given)}"


def _not_one_of(given: object, valid: list[str]) -> str:
    meant = nearest(str(given), valid)
    guess = f"did you mean {meant!r}? " if meant is not None else ""
    return f"{_shown(given)} is not valid; {guess}one of {', '.join(valid)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _place_of_message(message: str, key: Key, places: Places) -> str:
    """Validators over several keys name them in their message: the first that the recipe set is the place."""
    for word in _WORD.findall(message):
        if "." not in word and "_" not in word:
            continue
        steps: Key = tuple(word.split("."))
        for candidate in (steps, (*key, *steps), (*key[:-1], *steps)):
            if candidate in places.known:
                return places.known[candidate]
    return places.of(key)
