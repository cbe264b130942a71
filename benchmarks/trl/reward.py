"""The reward of both sides: the number behind the reasoning is the right one. The standard library only."""

from __future__ import annotations

import re
from typing import Any


def right(text: str, truth: str) -> float:
    """1 when the text ends with `</think>` and the truth, else 0."""
    found = re.search(r"</think>(\d+)$", text)
    return float(found is not None and found[1] == truth)


def last_number(text: str, truth: str) -> float:
    """1 when the last number of the text is the truth, else 0."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text)
    return float(bool(found) and found[-1] == truth)


def sluice_right(prompt: Any, answer: str) -> float:
    """`right` as `rewards=[{type="python", …}]` calls it."""
    return right(answer, prompt.answer)


def sluice_last_number(prompt: Any, answer: str) -> float:
    """`last_number` likewise."""
    return last_number(answer, prompt.answer)
