"""One JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from sluice.data.sources.rows import BadRow, Found, kind_of
from sluice.errors import DataError
from sluice.nearest import did_you_mean


def rows(path: Path) -> Iterator[Found]:
    """Every line that is not blank.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    check_file(path, ".jsonl")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    place = f"{path}:{number}"
                    try:
                        yield place, _object(place, line)
                    except BadRow as error:
                        yield place, error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error


def check_file(path: Path, suffix: str) -> None:
    """Raise DataError, naming the nearest, when there is no file `path`; `suffix` is what it should be."""
    if path.is_file():
        return
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a file", hint=f"name a {suffix} file in it")
    if not path.parent.is_dir():
        raise DataError(
            f"{path} does not exist, nor does its folder",
            hint=f"relative paths start in the working directory, {Path.cwd()}",
        )
    names = [each.name for each in path.parent.iterdir() if each.is_file()]
    raise DataError(f"{path} does not exist", hint=did_you_mean(path.name, names, otherwise="its folder holds no file"))


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
            f"{place} is {kind_of(value)}, not an object",
            hint='write {"prompt": …, "answer": …}, or set on_bad_row = \'skip\'',
        )
    return cast("dict[str, Any]", value)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
