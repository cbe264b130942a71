"""Entries as JSON: what `sluice episodes` prints, one object per line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sluice.log.records import Entry, RewardRecord
from sluice.types import Version


def to_json(entry: Entry) -> dict[str, Any]:
    """An entry as plain JSON values: `seq`, `at`, `kind`, and the fields of its record by name.

    Token ids and log-probs are lists. A float32 is written with the fewest digits that give the same float32
    back, a float64 likewise. JSON has no NaN and no infinities: they are the strings "NaN", "Infinity" and
    "-Infinity", which Python's `float` reads. A version is "5.0", a tuple a list, and a key that is no string
    is written as one. A reward has its `total` besides its components.
    """
    line = {"seq": entry.seq, "at": entry.at, "kind": entry.record.kind.value, **_fields(entry.record)}
    if isinstance(entry.record, RewardRecord):
        line["total"] = _plain(entry.record.reward.total)
    return line


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Version):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.ndarray):
        return _list(cast("NDArray[Any]", value))
    if is_dataclass(value):
        return _fields(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {key if isinstance(key, str) else str(key): _plain(item) for key, item in items}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return _float(value) if isinstance(value, float) else value


def _list(array: NDArray[Any]) -> list[Any]:
    if array.dtype.kind != "f":
        return array.tolist()
    return [_float(float(str(number))) for number in array]  # str: the fewest digits of this width


def _float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
