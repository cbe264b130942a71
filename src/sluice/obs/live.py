"""The live view: a few lines at the bottom of a terminal that are drawn anew while the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sluice.obs.board import HISTORY, Board
from sluice.obs.compare import Answer, compare_table, compare_text, fits_table
from sluice.obs.format import SHOWN, duration, harmless, number, one_line, sparkline
from sluice.obs.summary import Summary

_LOG = logging.getLogger(__name__)
_CELL = 28
"""Columns that one metric takes."""


class LiveView:
    """Shows progress, metrics and evaluations in place.

    A terminal that goes away, or cannot hold a character, ends the view, not the run.

    Args:
        console: where to draw.
        refresh_per_second: how often; 0 draws only when something happens.
    """

    def __init__(self, console: Console, *, refresh_per_second: float = 2.0, board: Board | None = None) -> None:
        self._console = console
        self._board = board or Board()
        self._live = Live(
            console=console,
            get_renderable=self._render,
            auto_refresh=refresh_per_second > 0,
            refresh_per_second=refresh_per_second or 1,
        )
        self._gone = False

    def _render(self) -> RenderableType:
        return render(self._board, self._console.width)

    def start(self, name: str, steps: int, folder: str, facts: Mapping[str, str] | None = None) -> None:
        """Begin to draw."""
        self._board.start(name, steps, folder, facts or {})
        self._draw(self._live.start)

    def phase(self, name: str) -> None:
        """Tell what is being done."""
        self._board.phase = name
        self._draw(self._refresh)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A batch is trained."""
        self._board.note("train", step, self._board.total, metrics)
        self._draw(self._refresh)

    def progress(self, stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """A step of another stage, such as `sft`, is done."""
        self._board.note(stage, step, steps, metrics)
        self._draw(self._live.start)
        self._draw(self._refresh)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""
        self._board.evaluated(step, metrics)
        self._draw(self._refresh)

    def compare(self, before: Sequence[Answer], after: Sequence[Answer]) -> None:
        """Show sampled answers before and after, above the view."""
        width = self._console.width
        if not before and not after:
            return
        if fits_table(width):
            self._print(compare_table(before, after))
        else:
            self._print(Text(compare_text(before, after, width=width)))

    def log(self, message: str) -> None:
        """Print a line above the view."""
        self._print(Text(harmless(message)))

    def finish(self, summary: Summary) -> None:
        """Stop drawing and print what came out."""
        self._board.phase = "done"
        self.close()
        self._print(Text("\n".join(summary_lines(summary))))

    def close(self) -> None:
        """Stop drawing. May be called twice."""
        self._draw(self._live.stop)

    def _print(self, content: RenderableType) -> None:
        self._draw(lambda: self._console.print(content))

    def _refresh(self) -> None:
        if self._live.is_started:
            self._live.refresh()

    def _draw(self, action: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # the terminal was closed, or cannot hold a character
            self._gone = True
            _LOG.warning("the live view ends, the run goes on: %s", error)


def render(board: Board, width: int) -> RenderableType:
    """The view's lines at a width of so many columns."""
    parts: list[RenderableType] = [_line(_header(board), "bold")]
    facts = " · ".join(one_line(f"{name} {value}") for name, value in board.facts.items())
    if facts:
        parts.append(_line(facts, "dim"))
    parts.append(_progress(board, width))
    if board.rewards:
        spark = sparkline(board.rewards, min(HISTORY, width - 16))
        parts.append(_line(f"reward  {number(board.rewards[-1], '.3f'):>6} {spark}", "green"))
    if board.evaluations:
        first, last = board.evaluations[0], board.evaluations[-1]
        before = f"{number(first[1], '.3f')} → " if len(board.evaluations) > 1 else ""
        parts.append(_line(f"eval    {before}{number(last[1], '.3f')} (step {last[0]})", "cyan"))
    parts.append(_metrics(board, width))
    return Group(*parts)


def summary_lines(summary: Summary) -> list[str]:
    """What came out of a run, in a few lines."""
    lines: list[str] = []
    for label, before, after in (
        ("eval", summary.eval_before, summary.eval_after),
        ("greedy", summary.greedy_before, summary.greedy_after),
    ):
        if before is not None or after is not None:
            lines.append(f"{label:<9}{number(before, '.3f')} before, {number(after, '.3f')} after")
    lines.append(f"steps    {summary.steps} in {duration(summary.wall_seconds)}")
    speed = summary.rollout_tokens_per_second, summary.train_tokens_per_second
    lines.append(f"speed    {number(speed[0], 'count')} tokens/s rollout, {number(speed[1], 'count')} train")
    lines.append(f"mismatch {number(summary.logprob_mismatch_mean_abs, '.2g')} nats a token")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.time_split.items() if share >= 0.005)
    return [*lines, f"time     {shares}"] if shares else lines


def _header(board: Board) -> str:
    phase = f" · {one_line(board.phase)}" if board.phase else ""
    return f"{one_line(board.name) or board.stage}{phase}"


def _line(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _progress(board: Board, width: int) -> RenderableType:
    label = f"{board.stage} {board.step}/{board.steps}"
    times = f"{duration(board.elapsed)} · {duration(board.remaining)} left"
    room = width - len(label) - len(times) - 4
    if room < 8:
        return _line(f"{label} {times}", "")
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(board.steps, 1), completed=min(board.step, board.steps), width=min(room, 60))
    grid.add_row(_line(label, ""), bar, _line(times, "dim"))
    return grid


def _metrics(board: Board, width: int) -> RenderableType:
    cells = [
        (shown.label, number(board.metrics[shown.key], shown.style))
        for shown in SHOWN
        if shown.key in board.metrics and shown.key not in ("reward/mean", "eval/accuracy")
    ]
    known = {shown.key for shown in SHOWN}
    if board.stage != "train":
        cells += [(one_line(name), number(value)) for name, value in board.metrics.items() if name not in known]
    columns = max(1, min(4, width // _CELL))
    grid = Table.grid(padding=(0, 2))
    for _ in range(columns):
        grid.add_column(style="dim", no_wrap=True, overflow="ellipsis")
        grid.add_column(justify="right", no_wrap=True, overflow="ellipsis")
    for start in range(0, len(cells), columns):
        grid.add_row(*(Text(text) for cell in cells[start : start + columns] for text in cell))
    return grid
