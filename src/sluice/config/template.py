"""Format strings over the fields of a row, such as `"{question} ({unit})"`."""

from __future__ import annotations

from functools import lru_cache
from string import Formatter
from typing import NamedTuple


class Hole(NamedTuple):
    """A place of a template that a field fills, and the text before it. `field` is None behind the last one."""

    before: str
    field: str | None
    spec: str


@lru_cache(maxsize=64)
def template_fields(template: str) -> tuple[Hole, ...]:
    """The holes of a template, in order.

    Raises:
        ValueError: it is no format string, a hole has no name, or it has a conversion or nested holes.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r} is no format string: {error}; a brace itself is written twice") from error
    holes: list[Hole] = []
    for before, field, spec, conversion in parsed:
        if field == "" or (field or "").isdecimal():
            raise ValueError(f"{template!r} has a hole without a name; write {{column}}")
        if conversion or "{" in (spec or ""):
            raise ValueError(f"{template!r}: {{{field}}} has a conversion or a hole inside; write {{column:spec}}")
        if "[" in (field or ""):
            raise ValueError(f"{template!r}: nested fields are written with dots, {{choices.0}}, not {{{field}}}")
        holes.append(Hole(before, field, spec or ""))
    if template and not any(hole.field for hole in holes):
        raise ValueError(f"{template!r} names no column, so every row would ask the same; write {{column}}")
    return tuple(holes)
