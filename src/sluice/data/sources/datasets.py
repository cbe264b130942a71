"""Folders of the Hugging Face `datasets` library on this machine. Nothing is fetched, and nothing is cached."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from sluice.data.sources import jsonl, parquet
from sluice.data.sources.arrow import BATCH_ROWS, extra, rows_of
from sluice.data.sources.rows import Found
from sluice.errors import DataError
from sluice.nearest import did_you_mean

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


def rows(path: Path, split: str, subset: str) -> Iterator[Found]:
    """Every row of one split.

    Args:
        path: what `save_to_disk` wrote, or a folder of Parquet, JSON or CSV files laid out as a data set.
        split: such as `train`.
        subset: configuration of such a folder; empty takes the default one.

    Raises:
        ConfigError: `datasets` is not installed.
        DataError: no such folder, split or subset, or its files cannot be read.
    """
    library = extra("datasets", "a source of type 'datasets'")
    if not path.is_dir():
        raise DataError(
            f"{path} is {'a file' if path.exists() else 'no folder on this machine'}, and data sets are read from "
            "folders only: nothing is fetched from a hub while a run starts",
            hint=f"get it first, `hf download --repo-type dataset {path} --local-dir FOLDER`, and name the folder"
            if not path.exists()
            else "name its folder, or use type = 'jsonl' or 'parquet' for a file",
        )
    with tempfile.TemporaryDirectory() as scratch, _no_network():
        try:
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                yield from _rows(_saved(library, path, split, subset), path, split)
            else:
                yield from _laid_out(library, path, split, subset, scratch)
        except (OSError, ValueError, TypeError, KeyError, library.exceptions.DatasetsError) as error:
            raise DataError(
                f"{path} cannot be read as a data set: {error}", hint="see `datasets.load_dataset` on local folders"
            ) from error


def _rows(data: Any, path: Path, split: str) -> Iterator[Found]:
    """Rows as they are stored: nothing is decoded (images, audio)."""
    tables = data.with_format("arrow").iter(batch_size=BATCH_ROWS)
    return rows_of(tables, lambda number: f"{path} ({split}): row {number}")


def _saved(library: Any, path: Path, split: str, subset: str) -> Any:
    """A split of what `save_to_disk` wrote."""
    if subset:
        raise DataError(f"{path} was saved to disk and has no subsets", hint="leave `subset` out")
    found = library.load_from_disk(str(path))
    if not isinstance(found, library.DatasetDict):
        own = str(found.split or split)
        if own != split:
            raise DataError(f"{path} holds the split {own!r}, not {split!r}", hint=f"set split = {own!r}")
        return found
    if split not in found:
        raise DataError(f"{path} has no split {split!r}", hint=did_you_mean(split, found))
    return found[split]


def _laid_out(library: Any, path: Path, split: str, subset: str, scratch: str) -> Iterator[Found]:
    """Rows of a split that the library finds in a folder's files; those of JSON lines and Parquet are read as the
    sources of these types do, without guessing at their columns."""
    _check_card(path)
    names = library.get_dataset_config_names(str(path.absolute()))
    if subset and subset not in names:
        raise DataError(f"{path} has no subset {subset!r}", hint=did_you_mean(subset, names))
    builder = library.load_dataset_builder(str(path.absolute()), subset or None, cache_dir=scratch)
    splits: dict[str, list[str]] = builder.config.data_files or {}
    if split not in splits:
        raise DataError(f"{path} has no split {split!r}", hint=did_you_mean(split, splits))
    files = [Path(file) for file in splits[split]]
    read = {".jsonl": jsonl.rows, ".ndjson": jsonl.rows, ".parquet": parquet.rows}
    if all(file.suffix in read for file in files):
        for file in files:
            yield from read[file.suffix](file)
    else:
        yield from _rows(builder.as_streaming_dataset(split=split), path, split)


def _check_card(path: Path) -> None:
    """A data set's README may name files elsewhere; they would be fetched."""
    card = path / "README.md"
    matter = _FRONT_MATTER.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    told = extra("yaml", "a source of type 'datasets'").safe_load(matter[1]) if matter else None
    named = cast("dict[str, Any]", told).get("configs") if isinstance(told, dict) else None
    elsewhere = next((text for text in _texts(named) if "://" in text), "")
    if elsewhere:
        raise DataError(
            f"{card} names files elsewhere, {elsewhere}, and nothing is fetched while a run starts",
            hint="get the files, put them into the folder, and name them in its README.md",
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _texts(inner)
    elif isinstance(value, dict):
        for inner in cast("dict[Any, Any]", value).values():
            yield from _texts(inner)


@contextmanager
def _no_network() -> Generator[None]:
    """The libraries' own offline mode, for as long as a folder is read."""
    places = [(extra(name, "a source of type 'datasets'"), "HF_HUB_OFFLINE")
              for name in ("datasets.config", "huggingface_hub.constants")]  # fmt: skip
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
