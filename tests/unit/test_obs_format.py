"""Numbers and text for people."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.obs.format import duration, harmless, number, one_line, shorten, sparkline


@pytest.mark.parametrize(
    "value, style, text",
    [
        (None, ".3g", "-"), (math.nan, "count", "-"), (math.inf, ".3f", "-"), (0.0, "count", "0"),
        (999, "count", "999"),
        (999.97, "count", "1k"), (999_999, "count", "1M"), (1234, "count", "1.23k"), (-5e6, "count", "-5M"),
        (3.2e12, "count", "3.2T"), (0.12345, ".3g", "0.123"),
    ],
)  # fmt: skip
def test_number(value: float | None, style: str, text: str) -> None:
    assert number(value, style) == text


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.6, 125, 7_500, 90_000)] == ["0s", "1m00s", "2m05s", "2h05m", "1d01h"]
    assert [duration(s) for s in (None, math.nan, -1)] == ["-", "-", "-"]


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3], 3) == "▁▅█"
    assert sparkline([0, math.nan, 1], 9) == "▁ █"
    assert sparkline([5, 5], 9) == "▁▁"
    assert sparkline([1], 0) == sparkline([], 5) == ""
    assert sparkline([math.nan], 5) == " "
    assert sparkline([-1.7e308, 1.7e308, 0, 5e-324], 5) == "▁█▅▅"


@given(st.text(), st.integers(0, 60))
def test_text_is_shortened_and_harmless(text: str, limit: int) -> None:
    assert len(shorten(text, limit)) <= limit
    assert "\n" not in one_line(text)
    assert all(character.isprintable() or character in "\n\t" or character.isspace() for character in harmless(text))
    assert not set(harmless(text)) & set("\x1b\x07\x08\r\x9b\u202e\u2028")
