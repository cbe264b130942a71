"""Parquet files, read a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sluice.data.sources.arrow import BATCH_ROWS, extra, rows_of
from sluice.data.sources.jsonl import check_file
from sluice.data.sources.rows import Found
from sluice.errors import DataError


def rows(path: Path) -> Iterator[Found]:
    """Every row of a file, or of the `*.parquet` files of a folder in the order of their names.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: there is no file, or one is no Parquet or is damaged.
    """
    extra("pyarrow.parquet", "a Parquet source")
    for file in _files(path):
        yield from rows_of(_batches(file), lambda number, file=file: f"{file}: row {number}")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        check_file(path, ".parquet")
        return [path]
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(
            f"{path} holds no *.parquet file",
            hint="name a file, or read a data set's folder with type = 'datasets'",
        )
    return files


def _batches(file: Path) -> Iterator[Any]:
    pyarrow, parquet = extra("pyarrow", "a Parquet source"), extra("pyarrow.parquet", "a Parquet source")
    try:
        with parquet.ParquetFile(file) as opened:
            yield from opened.iter_batches(batch_size=BATCH_ROWS)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read as Parquet: {error}", hint="it may be cut short; copy or write it again"
        ) from error
