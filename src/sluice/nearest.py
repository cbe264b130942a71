"""The name that somebody probably meant. Imports nothing of Sluice."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option closest to `name`, regardless of case; None when nothing is close."""
    folded: dict[str, str] = {}
    for option in options:
        folded.setdefault(option.lower(), option)
    close = get_close_matches(name.lower(), list(folded), n=1, cutoff=0.5)
    return folded[close[0]] if close else None


def did_you_mean(name: str, options: Iterable[str], *, otherwise: str = "") -> str:
    """`did you mean 'x'?` for a hint; without a close option `it has: a, b, …`, and `otherwise` for none."""
    known = sorted(set(options))
    close = nearest(name, known)
    if close is not None:
        return f"did you mean {close!r}?"
    if not known:
        return otherwise
    shown = ", ".join(known[:12])
    return f"there is: {shown}{', …' if len(known) > 12 else ''}"
