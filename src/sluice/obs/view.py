"""What a person sees of a run. A view only shows: it decides nothing, and no trouble of its own ends a run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Protocol

from rich.console import Console

from sluice.obs.board import Board
from sluice.obs.compare import Answer, compare_text
from sluice.obs.format import SHOWN, duration, harmless, number, one_line
from sluice.obs.live import LiveView, summary_lines
from sluice.obs.summary import Summary

_LOG = logging.getLogger(__name__)
_EVERY_SECONDS = 2.0
_SEPARATORS = str.maketrans({"·": "|", "→": ">", "…": "~"})


class View(Protocol):
    """Is told what happens, in this order: start, then anything, then finish and close."""

    def start(self, name: str, steps: int, folder: str, facts: Mapping[str, str] | None = None) -> None:
        """A run begins. `facts` are shown beside its name: model, parameters, task, device."""
        ...

    def phase(self, name: str) -> None:
        """What is being done from now on."""
        ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A batch is trained; metrics as they are written to the sinks."""
        ...

    def progress(self, stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """A step of another stage, such as `sft`, is done."""
        ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""
        ...

    def compare(self, before: Sequence[Answer], after: Sequence[Answer]) -> None:
        """Sampled answers to the same prompts before and after training."""
        ...

    def log(self, message: str) -> None:
        """A message for the person who watches."""
        ...

    def finish(self, summary: Summary) -> None:
        """The run is over."""
        ...

    def close(self) -> None:
        """Give the terminal back. May be called twice."""
        ...


class NullView:
    """Shows nothing."""

    def start(self, name: str, steps: int, folder: str, facts: Mapping[str, str] | None = None) -> None:
        """Nothing."""

    def phase(self, name: str) -> None:
        """Nothing."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def progress(self, stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def compare(self, before: Sequence[Answer], after: Sequence[Answer]) -> None:
        """Nothing."""

    def log(self, message: str) -> None:
        """Nothing."""

    def finish(self, summary: Summary) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainView:
    """Aligned lines without control characters, for files and pipes.

    Args:
        stream: where to write; None takes standard output.
        every_seconds: at most one line of a stage in this time, but always its first and its last.
        board: keeps the state; tests give one with a clock of their own.
    """

    def __init__(
        self, stream: IO[str] | None = None, *, every_seconds: float = _EVERY_SECONDS, board: Board | None = None
    ) -> None:
        self._stream = stream or sys.stdout
        self._every = every_seconds
        self._board = board or Board()
        self._last: tuple[str, float] | None = None
        self._gone = False

    def start(self, name: str, steps: int, folder: str, facts: Mapping[str, str] | None = None) -> None:
        """Tell what begins."""
        self._board.start(name, steps, folder, facts or {})
        shown = "".join(f" · {label} {value}" for label, value in self._board.facts.items())
        self._write(one_line(f"{name}: {steps} steps in {folder}{shown}"))

    def phase(self, name: str) -> None:
        """Phases are too many for lines: they are in the metrics as `time/…`."""
        self._board.phase = name

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, unless the last one is fresh."""
        self._board.note("train", step, self._board.total, metrics)
        self._progress()

    def progress(self, stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """The same for another stage."""
        self._board.note(stage, step, steps, metrics)
        self._progress()

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line."""
        self._board.evaluated(step, metrics)
        shown = "  ".join(f"{name.removeprefix('eval/')} {number(value, '.4g')}" for name, value in metrics.items())
        self._write(f"eval  {step:>6}  {shown}")

    def compare(self, before: Sequence[Answer], after: Sequence[Answer]) -> None:
        """Three lines a prompt."""
        if before or after:
            self._write(compare_text(before, after))

    def log(self, message: str) -> None:
        """One line."""
        self._write(message)

    def finish(self, summary: Summary) -> None:
        """A few lines."""
        self._write("\n".join(summary_lines(summary)))

    def close(self) -> None:
        """Nothing to give back."""

    def _progress(self) -> None:
        board, now = self._board, self._board.clock()
        fresh = self._last is not None and self._last[0] == board.stage and now - self._last[1] < self._every
        if fresh and board.step != board.steps:
            return
        self._last = board.stage, now
        cells = [
            f"{shown.label} {number(board.metrics[shown.key], shown.style):>7}"
            for shown in SHOWN
            if shown.key in board.metrics and shown.key != "eval/accuracy"
        ]
        if board.stage != "train":
            cells = [f"{one_line(name)} {number(value):>7}" for name, value in board.metrics.items()]
        width = len(str(board.steps))
        left = f"{duration(board.remaining):>6} left"
        self._write("  ".join([f"{board.stage:<5} {board.step:>{width}}/{board.steps}", *cells, left]))

    def _write(self, text: str) -> None:
        if self._gone:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        if not encoding.lower().startswith("utf"):
            text = text.translate(_SEPARATORS)
        try:
            self._stream.write(harmless(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
            self._stream.flush()
        except (OSError, ValueError) as error:  # the pipe or the terminal was closed
            self._gone = True
            _LOG.warning("the view ends, the run goes on: %s", error)


def make_view(live: bool | None = None) -> View:
    """The view for standard output.

    Args:
        live: True draws in place even into a pipe, False writes lines, None draws when it is a terminal. An
            output that cannot hold Unicode always gets lines.
    """
    console = Console(force_terminal=True if live else None)
    wanted = console.is_terminal and not console.is_dumb_terminal if live is None else live
    if wanted and not console.encoding.lower().startswith("utf"):
        _LOG.warning("no live view: the output's encoding is %s; set PYTHONIOENCODING=utf-8 for one", console.encoding)
        wanted = False
    return LiveView(console) if wanted else PlainView()
