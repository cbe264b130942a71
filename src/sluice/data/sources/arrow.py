"""Tables of Arrow as rows of JSON values: what Parquet files and `datasets` folders are read into."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from importlib import import_module
from typing import Any, cast

from sluice.data.sources.rows import BadRow, Found
from sluice.errors import ConfigError

_LOG = logging.getLogger(__name__)

BATCH_ROWS = 1_000
"""Rows that are turned into Python objects at a time."""


def extra(module: str, needed_for: str) -> Any:
    """A module of the extra `data`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{needed_for} needs the package {error.name}, which is not installed",
            hint="pip install 'sluice-rl[data]'",
        ) from error


class Plainer:
    """Turns values of Arrow into those of JSON, and counts the bytes that no JSON can hold.

    NaN becomes null, which is what it means in tables made by pandas. Times become ISO 8601 text, decimals their
    digits. Bytes that are UTF-8 become text; others (images, audio) become null and are told once.
    """

    def __init__(self) -> None:
        self.lost_bytes = 0

    def plain(self, value: Any) -> Any:
        """The JSON form of one value.

        Raises:
            ValueError: it has none: infinity, or a kind that is not known here.
        """
        if value is None or isinstance(value, str | bool | int):
            return value
        if isinstance(value, float):
            if math.isinf(value):
                raise ValueError("infinity is no JSON number")
            return None if math.isnan(value) else value
        if isinstance(value, list):
            return self._plain_list(cast("list[Any]", value))
        if isinstance(value, dict):
            return {str(name): self.plain(inner) for name, inner in cast("dict[Any, Any]", value).items()}
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError:
                self.lost_bytes += 1
                return None
        if isinstance(value, datetime | date | time):
            return value.isoformat()
        if isinstance(value, Decimal | timedelta):
            return str(value)
        raise ValueError(f"a {type(value).__name__} has no JSON form")

    def _plain_list(self, items: list[Any]) -> Any:
        """A map comes as a list of pairs, and stays one."""
        return [list(map(self.plain, cast("tuple[Any, ...]", each))) if isinstance(each, tuple) else self.plain(each)
                for each in items]  # fmt: skip


def rows_of(batches: Iterator[Any], place: Callable[[int], str]) -> Iterator[Found]:
    """Rows of Arrow tables or record batches, in order.

    Args:
        batches: of `pyarrow.Table` or `pyarrow.RecordBatch`.
        place: the name of the row with this number, from 1.
    """
    plainer = Plainer()
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield place(number), _plain_row(plainer, row, place(number))
    if plainer.lost_bytes:
        _LOG.warning(
            "%s and others: %d values are bytes, which the log cannot hold, and are left out", place(1),
            plainer.lost_bytes,
        )  # fmt: skip


def _plain_row(plainer: Plainer, row: dict[str, Any], place: str) -> dict[str, Any] | BadRow:
    fields: dict[str, Any] = {}
    for name, value in row.items():
        try:
            fields[name] = plainer.plain(value)
        except ValueError as error:
            return BadRow(f"{place}: column {name!r}: {error}", hint="mend the row, or set on_bad_row = 'skip'")
    return fields
