"""Answers before and after training, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich import box
from rich.table import Table
from rich.text import Text

from sluice.obs.format import harmless, number, one_line, shorten

_SHORTEST_TABLE = 60
_LIMIT = 400


class Answer(Protocol):
    """An answer that was scored."""

    @property
    def prompt(self) -> str: ...
    @property
    def truth(self) -> str: ...
    @property
    def response(self) -> str: ...
    @property
    def score(self) -> float: ...


def pair(before: Sequence[Answer], after: Sequence[Answer]) -> list[tuple[Answer | None, Answer | None]]:
    """Answers to equal prompts together, in the order of their appearance; None where one side has none."""
    rest = list(after)
    pairs: list[tuple[Answer | None, Answer | None]] = []
    for old in before:
        new = next((each for each in rest if each.prompt == old.prompt and each.truth == old.truth), None)
        if new is not None:
            rest = [each for each in rest if each is not new]
        pairs.append((old, new))
    return pairs + [(None, new) for new in rest]


def compare_table(before: Sequence[Answer], after: Sequence[Answer]) -> Table:
    """A table for a terminal: question with ground truth, answer and score before, answer and score after."""
    table = Table(box=box.SIMPLE_HEAD, expand=False, show_lines=False, pad_edge=False)
    for title in ("question", "before", "after"):
        table.add_column(title, ratio=1, overflow="fold")
    for old, new in pair(before, after):
        known = old or new
        assert known is not None  # a pair has one side at least
        question = Text(shorten(harmless(known.prompt.strip()), _LIMIT))
        if known.truth:
            question.append(f"\n= {shorten(one_line(known.truth), _LIMIT)}", style="dim")
        table.add_row(question, _cell(old), _cell(new))
    return table


def compare_text(before: Sequence[Answer], after: Sequence[Answer], *, width: int = 100) -> str:
    """The same as plain lines, none longer than `width`."""
    lines: list[str] = []
    for old, new in pair(before, after):
        known = old or new
        assert known is not None  # a pair has one side at least
        truth = f"  [= {one_line(known.truth)}]" if known.truth else ""
        lines.append(shorten(f"question  {one_line(known.prompt)}{truth}", width))
        for label, answer in (("before", old), ("after", new)):
            text = f"{number(answer.score, '.2f'):>5}  {one_line(answer.response)}" if answer else "    -"
            lines.append(shorten(f"  {label:<6}{text}", width))
    return "\n".join(lines)


def fits_table(width: int) -> bool:
    """Whether three columns of text can be read at this width."""
    return width >= _SHORTEST_TABLE


def _cell(answer: Answer | None) -> Text:
    if answer is None:
        return Text("-", style="dim")
    style = "green" if answer.score >= 1 else "yellow" if answer.score > 0 else "red"
    text = Text(f"{number(answer.score, '.2f')}  ", style=style)
    text.append(shorten(harmless(answer.response.strip()), _LIMIT), style="default")
    return text
