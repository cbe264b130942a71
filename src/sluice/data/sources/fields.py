"""Fields of a row by dotted name, through nested objects and lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

MISSING: Any = object()
"""What `look_up` gives for a field that is not there; None is a null that is."""


def look_up(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a field. A name that is there as it stands, dots included, goes before a nested one."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for step in name.split("."):
        value = _inside(value, step)
        if value is MISSING:
            return MISSING
    return value


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """The fields but for one, nested or not; what was passed in is not changed. A list keeps its length, with null."""
    if name in fields:
        return {key: value for key, value in fields.items() if key != name}
    if look_up(fields, name) is MISSING:
        return fields
    return cast("dict[str, Any]", _cut(fields, name.split(".")))


def _inside(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).get(step, MISSING)
    if isinstance(value, list) and step.isdecimal():
        items = cast("list[Any]", value)
        return items[int(step)] if int(step) < len(items) else MISSING
    return MISSING


def _cut(value: Any, steps: list[str]) -> Any:
    head, *rest = steps
    if isinstance(value, dict):
        table = cast("dict[str, Any]", value)
        if not rest:
            return {key: inner for key, inner in table.items() if key != head}
        return {**table, head: _cut(table[head], rest)}
    items = list(cast("list[Any]", value))
    items[int(head)] = _cut(items[int(head)], rest) if rest else None
    return items
