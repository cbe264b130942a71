"""One JSON object a line, as prompts. The row reading here also serves demonstrations."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import xxhash

from sluice.config.data import Columns, JsonlSource
from sluice.errors import DataError
from sluice.nearest import did_you_mean
from sluice.types import Message, Prompt

_LOG = logging.getLogger(__name__)


class Row(NamedTuple):
    """A usable row: where it stands, the prompt it makes, and its answer column."""

    place: str
    prompt: Prompt
    answer: str


class Loaded(NamedTuple):
    """What a file gave."""

    prompts: list[Prompt]
    skipped: int


class BadRow(DataError):  # noqa: N818  what on_bad_row speaks of
    """A row that cannot be used; `on_bad_row = skip` counts it instead."""


def load(config: JsonlSource) -> Loaded:
    """The prompts of a file, and how many rows were skipped.

    Raises:
        DataError: the file is missing or empty, a row is bad (unless skipped), or two rows have one id.
    """
    rows, skipped = read_rows(
        config.path, config.columns, task=config.task, system=config.system, on_bad_row=config.on_bad_row,
        need_answer="answer" in config.columns.model_fields_set,
    )  # fmt: skip
    return Loaded([row.prompt for row in rows], skipped)


def read_rows(
    path: Path,
    columns: Columns,
    *,
    task: str,
    system: str,
    on_bad_row: Literal["error", "skip"],
    need_answer: bool,
) -> tuple[list[Row], int]:
    """Rows in the order of the file, and the number of skipped ones.

    Args:
        path: the file.
        columns: which field holds what; one that was set by the user must be in every row.
        task: task name of the prompts.
        system: system message put first, when not empty.
        on_bad_row: raise, or count and warn.
        need_answer: a row without answer column is bad.

    Raises:
        DataError: see `load`.
    """
    rows: list[Row] = []
    places: dict[str, str] = {}
    first_bad: BadRow | None = None
    skipped = 0
    for place, line in _lines(path):
        try:
            row = _row(place, _object(place, line), columns, task, system, need_answer)
            _check_new(row, places)
        except BadRow as error:
            if on_bad_row == "error":
                raise
            first_bad, skipped = first_bad or error, skipped + 1
            continue
        places[row.prompt.id] = place
        rows.append(row)
    if not rows:
        what = f"all {skipped} rows are bad, the first: {first_bad.args[0]}" if first_bad else "it is empty"
        raise DataError(f"{path} holds no usable row: {what}", hint="one JSON object a line is expected")
    if first_bad:
        _LOG.warning(
            "%s: skipped %d bad rows of %d, the first: %s", path, skipped, skipped + len(rows), first_bad.args[0]
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


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """`file:line` and the bytes of every line that is not blank."""
    if not path.is_file():
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a file", hint="name a .jsonl file in it")
        if not path.parent.is_dir():
            raise DataError(
                f"{path} does not exist, nor does its folder",
                hint=f"relative paths start in the working directory, {Path.cwd()}",
            )
        names = [each.name for each in path.parent.iterdir() if each.is_file()]
        raise DataError(
            f"{path} does not exist", hint=did_you_mean(path.name, names, otherwise="its folder holds no file")
        )
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error


def _object(place: str, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"{place} is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}",
            hint="convert the file to UTF-8, or set on_bad_row = 'skip'",
        ) from error
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadRow(
            f"{place} is not JSON: {error.msg} at column {error.colno}",
            hint="each line is one JSON object; mend the line, or set on_bad_row = 'skip'",
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{place} is not JSON: {error}", hint="mend the line, or set on_bad_row = 'skip'") from error
    if not isinstance(value, dict):
        raise BadRow(
            f"{place} is {_kind(value)}, not an object",
            hint='write {"prompt": …, "answer": …}, or set on_bad_row = \'skip\'',
        )
    return cast("dict[str, Any]", value)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _row(place: str, fields: dict[str, Any], columns: Columns, task: str, system: str, need_answer: bool) -> Row:
    messages = _messages(place, _column(place, fields, columns.prompt, "prompt"), columns.prompt)
    if system:
        if messages[0].role == "system":
            raise BadRow(
                f"{place} has a system message of its own, and the source's `system` is set too",
                hint="leave `system` empty, or remove the message from the rows",
            )
        messages = (Message("system", system), *messages)
    answer = ""
    if need_answer or fields.get(columns.answer) is not None:
        answer = _as_text(_column(place, fields, columns.answer, "answer"))
    id = ""
    if "id" in columns.model_fields_set or fields.get(columns.id) is not None:
        id = _as_text(_column(place, fields, columns.id, "id"))
    for what, text in (("prompt", "".join(message.content for message in messages)), ("answer", answer), ("id", id)):
        problem = check_text(text)
        if problem:
            raise BadRow(f"{place}: the {what} {problem}", hint="mend the line, or set on_bad_row = 'skip'")
    used = {columns.prompt, columns.answer, columns.id}
    rest = {name: value for name, value in fields.items() if name not in used}
    prompt = Prompt(id or content_id(task, messages, answer), task, messages, answer, rest)
    return Row(place, prompt, answer)


def _column(place: str, fields: Mapping[str, Any], name: str, role: str) -> Any:
    if fields.get(name) is not None:
        return fields[name]
    if name in fields:
        raise BadRow(f"{place}: column {name!r} is null", hint="fill it, or set on_bad_row = 'skip'")
    had = ", ".join(map(repr, fields)) or "none"
    raise BadRow(
        f"{place} has no column {name!r} for the {role}; its columns are {had}",
        hint=f"set columns.{role}; {did_you_mean(name, fields)}".removesuffix("; "),
    )


def _messages(place: str, value: Any, column: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{place}: column {column!r} is empty", hint="fill it, or set on_bad_row = 'skip'")
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise BadRow(
            f"{place}: column {column!r} is {_kind(value)}; a string or a list of messages was expected",
            hint='write "text" or [{"role": "user", "content": "text"}]',
        )
    return tuple(
        _message(f"{place}: message {number} of column {column!r}", each)
        for number, each in enumerate(cast("list[Any]", value), start=1)
    )


def _message(place: str, value: Any) -> Message:
    hint = 'a message is {"role": "user", "content": "text"}'
    if not isinstance(value, dict):
        raise BadRow(f"{place} is {_kind(value)}, not an object", hint=hint)
    message = cast("dict[str, Any]", value)
    for name in ("role", "content"):
        if not isinstance(message.get(name), str) or (name == "role" and not message[name]):
            what = f"has a {name} that is {_kind(message[name])}" if name in message else f"has no {name!r}"
            raise BadRow(f"{place} {what}; text was expected", hint=hint)
    extra = sorted(message.keys() - {"role", "content"})
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


def _kind(value: Any) -> str:
    kinds = {
        str: "a string", bool: "true or false", int: "a number", float: "a number",
        list: "a list", dict: "an object", type(None): "null",
    }  # fmt: skip
    empty = "an empty list" if value == [] else ""
    return empty or kinds[type(value)]
