"""Numbers and text for people: short, of one line, and harmless to a terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_BARS = "▁▂▃▄▅▆▇█"


class Shown(NamedTuple):
    """A metric that a view shows."""

    key: str
    label: str
    style: str = ".3g"


SHOWN = (
    Shown("reward/mean", "reward", ".3f"),
    Shown("eval/accuracy", "eval", ".3f"),
    Shown("speed/rollout_tokens_per_second", "rollout tok/s", "count"),
    Shown("speed/train_tokens_per_second", "train tok/s", "count"),
    Shown("gate/lag_mean", "lag", ".1f"),
    Shown("mismatch/mean_abs", "mismatch", ".2g"),
    Shown("rollout/groups_dropped", "dropped", "count"),
    Shown("train/policy_kl", "KL", ".3g"),
    Shown("train/entropy", "entropy", ".3g"),
    Shown("train/loss", "loss", ".3g"),
    Shown("train/grad_norm", "grad norm", ".3g"),
)
"""What both views show, in this order; a metric that a run does not have is left out."""


def number(value: float | None, style: str = ".3g") -> str:
    """A short number; `count` gives 1.2k and 3.4M; `-` for one that is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    if style != "count":
        return format(value, style)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.99995:
            return f"{value / size:.3g}{letter}" if abs(value) < size * 999.5 else f"{value / size:.0f}{letter}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """`42s`, `3m05s`, `2h07m`, `3d04h`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars between their least and greatest; a gap where one is not finite."""
    last = list(values)[-width:] if width > 0 else []
    halves = [value / 2 for value in last if math.isfinite(value)]  # halved, so that no difference overflows
    if not halves:
        return " " * len(last)
    low, span = min(halves), max(halves) - min(halves)

    def bar(value: float) -> str:
        return _BARS[round((value / 2 - low) / span * (len(_BARS) - 1)) if span else 0]

    return "".join(bar(value) if math.isfinite(value) else " " for value in last)


def harmless(text: str) -> str:
    """`text` with control, format and private characters shown as escapes, so that it cannot steer a terminal.

    Model output may hold anything, escape sequences included. Line ends and tabs stay.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else character.encode("unicode_escape").decode()
        for character in text
    )


def one_line(text: str) -> str:
    """`text` without line ends, harmless."""
    return harmless(" ".join(text.split()))


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, with the middle left out: start and end of an answer tell the most."""
    if len(text) <= limit:
        return text
    if limit <= 3:
        return text[: max(limit, 0)]
    head = (limit - 3) * 2 // 3
    tail = limit - 3 - head
    return f"{text[:head]} … {text[len(text) - tail :]}"


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become null, at any depth; keys become text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def finite_items(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The metrics that are finite numbers."""
    return {name: float(v) for name, v in metrics.items() if v is not None and math.isfinite(v)}
