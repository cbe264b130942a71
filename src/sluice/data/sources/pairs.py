"""Pairs of a better and a worse response from rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sluice.config.preferences import JsonlPairs, PairColumns
from sluice.data.sources import jsonl
from sluice.data.sources.fields import MISSING, look_up
from sluice.data.sources.rows import BadRow, Found, Reading, check_text, kind_of, read_rows
from sluice.types import Prompt


class TextPair(NamedTuple):
    """Two responses to one prompt."""

    prompt: Prompt
    chosen: str
    rejected: str


def load_pairs(config: JsonlPairs) -> list[TextPair]:
    """Pairs in the order of the file.

    Raises:
        DataError: missing or empty, or a row that is no pair: a response is missing, no text, empty, or both are equal.
    """
    columns = config.columns
    reading = Reading(columns, "preference", on_bad_row=config.on_bad_row, need_answer=True)
    rows, _ = read_rows(str(config.path), _checked(jsonl.rows(config.path), columns), reading)
    return [TextPair(row.prompt, row.answer, str(look_up(row.prompt.metadata, columns.rejected))) for row in rows]


def _checked(found: Iterable[Found], columns: PairColumns) -> Iterator[Found]:
    """Rows; one whose responses are no pair is a bad one."""
    for place, fields in found:
        if isinstance(fields, BadRow):
            yield place, fields
            continue
        responses = [(name, look_up(fields, name)) for name in (columns.answer, columns.rejected)]
        problem = next((told for name, value in responses if (told := _problem(name, value))), "")
        if not problem and responses[0][1] == responses[1][1]:
            problem = f"columns {columns.answer!r} and {columns.rejected!r} are equal, so nothing is preferred"
        hint = 'write {"prompt": …, "chosen": "text", "rejected": "text"}, or set on_bad_row = \'skip\''
        yield place, BadRow(f"{place}: {problem}", hint=hint) if problem else fields


def _problem(name: str, value: object) -> str:
    """Why a column is no response; empty when it is one."""
    if value is MISSING:
        return f"there is no column {name!r}"
    if not isinstance(value, str):
        return f"column {name!r} is {kind_of(value)}, not a string"
    if not value.strip():
        return f"column {name!r} is empty"
    fault = check_text(value)
    return f"column {name!r} {fault}" if fault else ""
