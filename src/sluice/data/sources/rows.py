"""Rows of any file as prompts: columns, templates, what is refused and why. Also serves demonstrations."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import xxhash

from sluice.config.data import Columns, RowSource
from sluice.config.template import template_fields
from sluice.data.sources.fields import MISSING, look_up, without
from sluice.errors import DataError
from sluice.nearest import did_you_mean
from sluice.types import Message, Prompt

_LOG = logging.getLogger(__name__)


class Row(NamedTuple):
    """A usable row: where it stands, the prompt it makes, and its answer column."""

    place: str
    prompt: Prompt
    answer: str


class BadRow(DataError):  # noqa: N818  what on_bad_row speaks of
    """A row that cannot be used; `on_bad_row = skip` counts it instead."""


Found: TypeAlias = tuple[str, dict[str, Any] | BadRow]
"""Where a row stands, and its fields as JSON values, or why it has none."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows become prompts; the fields are those of `RowSource`. A row without answer is bad if `need_answer`."""

    columns: Columns
    task: str
    system: str = ""
    template: str = ""
    on_bad_row: Literal["error", "skip"] = "error"
    need_answer: bool = False

    @classmethod
    def of(cls, config: RowSource) -> Reading:
        """As a source says: the answer column must be there when the recipe names it."""
        need = "answer" in config.columns.model_fields_set
        return cls(config.columns, config.task, config.system, config.template, config.on_bad_row, need)


def read_rows(name: str, found: Iterable[Found], reading: Reading) -> tuple[list[Row], int]:
    """Rows in their order, and the number of skipped ones.

    Args:
        name: of the source, for messages.
        found: its rows.
        reading: how they become prompts.

    Raises:
        DataError: there is none, a row is bad (unless skipped), or two rows have one id.
    """
    rows: list[Row] = []
    places: dict[str, str] = {}
    first_bad: BadRow | None = None
    skipped = 0
    for place, fields in found:
        try:
            row = _row(place, fields, reading)
            _check_new(row, places)
        except BadRow as error:
            if reading.on_bad_row == "error":
                raise
            first_bad, skipped = first_bad or error, skipped + 1
            continue
        places[row.prompt.id] = place
        rows.append(row)
    if not rows:
        what = f"all {skipped} rows are bad, the first: {first_bad.args[0]}" if first_bad else "it is empty"
        hint = first_bad.hint if first_bad else "give it rows with a prompt each"
        raise DataError(f"{name} holds no usable row: {what}", hint=hint)
    if first_bad:
        _LOG.warning(
            "%s: skipped %d bad rows of %d, the first: %s", name, skipped, skipped + len(rows), first_bad.args[0]
        )
    return rows, skipped


def content_id(task: str, messages: tuple[Message, ...], answer: str) -> str:
    """The id of a prompt that brings none: its task and a hash of text and answer."""
    return f"{task}-{xxhash.xxh3_64_hexdigest(json.dumps([messages, answer]).encode())}"


def check_text(text: str) -> str:
    """Why `text` cannot be stored or tokenised; empty when it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half of a surrogate pair, {text[error.start]!r}"
    return ""


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {
        str: "a string", bool: "true or false", int: "a number", float: "a number",
        list: "a list", dict: "an object", type(None): "null",
    }  # fmt: skip
    empty = "an empty list" if value == [] else ""
    return empty or kinds[type(value)]


def _row(place: str, fields: dict[str, Any] | BadRow, reading: Reading) -> Row:
    if isinstance(fields, BadRow):
        raise fields
    columns = reading.columns
    if reading.template:
        messages = (Message("user", _filled(place, fields, reading.template)),)
    else:
        messages = _messages(place, _column(place, fields, columns.prompt, "prompt"), columns.prompt)
    if reading.system:
        if messages[0].role == "system":
            raise BadRow(
                f"{place} has a system message of its own, and the source's `system` is set too",
                hint="leave `system` empty, or remove the message from the rows",
            )
        messages = (Message("system", reading.system), *messages)
    answer = ""
    if reading.need_answer or look_up(fields, columns.answer) not in (None, MISSING):
        answer = _as_text(_column(place, fields, columns.answer, "answer"))
    id = ""
    if "id" in columns.model_fields_set or look_up(fields, columns.id) not in (None, MISSING):
        id = _as_text(_column(place, fields, columns.id, "id"))
    for what, text in (("prompt", "".join(message.content for message in messages)), ("answer", answer), ("id", id)):
        problem = check_text(text)
        if problem:
            raise BadRow(f"{place}: the {what} {problem}", hint="mend the row, or set on_bad_row = 'skip'")
    rest = fields
    for column in (columns.answer, columns.id, *(() if reading.template else (columns.prompt,))):
        rest = without(rest, column)
    prompt = Prompt(id or content_id(reading.task, messages, answer), reading.task, messages, answer, rest)
    return Row(place, prompt, answer)


def _column(place: str, fields: Mapping[str, Any], name: str, role: str) -> Any:
    value = look_up(fields, name)
    if value is MISSING:
        had = ", ".join(map(repr, fields)) or "none"
        raise BadRow(
            f"{place} has no column {name!r} for the {role}; its columns are {had}",
            hint=f"set columns.{role}; {did_you_mean(name, fields)}".removesuffix("; "),
        )
    if value is None:
        raise BadRow(f"{place}: column {name!r} is null", hint="fill it, or set on_bad_row = 'skip'")
    return value


def _filled(place: str, fields: Mapping[str, Any], template: str) -> str:
    parts: list[str] = []
    for before, name, spec in template_fields(template):
        parts.append(before)
        if name is None:
            continue
        value = look_up(fields, name)
        if value is MISSING:
            had = ", ".join(map(repr, fields)) or "none"
            raise BadRow(
                f"{place} has no column {name!r}, which the template names; its columns are {had}",
                hint=did_you_mean(name, fields, otherwise="mend the template or the rows"),
            )
        if value is None:
            raise BadRow(
                f"{place}: column {name!r} is null, and the template names it",
                hint="fill it, or set on_bad_row = 'skip'",
            )
        try:
            parts.append(format(value, spec) if spec else _as_text(value))
        except (ValueError, TypeError) as error:
            raise BadRow(
                f"{place}: column {name!r} is {kind_of(value)}, which {{{name}:{spec}}} of the template cannot write: "
                f"{error}",
                hint="mend the template or the rows",
            ) from error
    text = "".join(parts)
    if not text.strip():
        raise BadRow(f"{place}: the template gives an empty question", hint="fill its columns")
    return text


def _messages(place: str, value: Any, column: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{place}: column {column!r} is empty", hint="fill it, or set on_bad_row = 'skip'")
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise BadRow(
            f"{place}: column {column!r} is {kind_of(value)}; a string or a list of messages was expected",
            hint='write "text" or [{"role": "user", "content": "text"}]',
        )
    return tuple(
        _message(f"{place}: message {number} of column {column!r}", each)
        for number, each in enumerate(cast("list[Any]", value), start=1)
    )


def _message(place: str, value: Any) -> Message:
    hint = 'a message is {"role": "user", "content": "text"}'
    if not isinstance(value, dict):
        raise BadRow(f"{place} is {kind_of(value)}, not an object", hint=hint)
    message = cast("dict[str, Any]", value)
    for name in ("role", "content"):
        if not isinstance(message.get(name), str) or (name == "role" and not message[name]):
            what = f"has a {name} that is {kind_of(message[name])}" if name in message else f"has no {name!r}"
            raise BadRow(f"{place} {what}; text was expected", hint=hint)
    extra = sorted(name for name in message.keys() - {"role", "content"} if message[name] is not None)
    if extra:
        raise BadRow(f"{place} has {extra[0]!r}, which would be lost", hint=hint)
    return Message(message["role"], message["content"])


def _check_new(row: Row, places: Mapping[str, str]) -> None:
    before = places.get(row.prompt.id)
    if before is None:
        return
    raise BadRow(
        f"{before} and {row.place} have the same id {row.prompt.id!r} (rows without an id are named by their content)",
        hint="remove one, give them different ids, or keep the first with on_bad_row = 'skip'",
    )


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
