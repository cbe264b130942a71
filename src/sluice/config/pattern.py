"""Regular expressions of a recipe: checked when it is read."""

from __future__ import annotations

from typing import Annotated, Any, cast

import regex
from pydantic import AfterValidator


def _compiles(value: str) -> str:
    engine = cast("Any", regex)  # the package has no types
    try:
        engine.compile(value)
    except engine.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return value


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression in the syntax of the `regex` package, a superset of Python's `re`."""
