"""Views at every width, with every kind of number and text. A view never ends a run."""

from __future__ import annotations

import io
import math
import re
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from sluice.obs.board import Board
from sluice.obs.compare import compare_table, compare_text, fits_table
from sluice.obs.live import LiveView, render, summary_lines
from sluice.obs.summary import Summary
from sluice.obs.view import NullView, PlainView, View, make_view

WIDTHS = (20, 21, 27, 33, 40, 59, 60, 80, 100, 137, 200, 300)
SUMMARY = Summary(0.1, 0.9, 0.2, None, 60, 3725, 5432, 1e6, {"rollout": 0.6, "train": 0.4}, 1e-6, 7)
METRICS = {
    "reward/mean": 0.25, "speed/rollout_tokens_per_second": 12_345.6, "speed/train_tokens_per_second": 999_999,
    "gate/lag_mean": 0.0, "mismatch/mean_abs": 1.2e-7, "rollout/groups_dropped": 3, "train/policy_kl": 0.001,
    "train/entropy": 1.5, "train/loss": -0.01, "train/grad_norm": 0.3, "train/unknown": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    prompt: str
    truth: str
    response: str
    score: float


BEFORE = [Shown("What is 1 + 1?", "2", "x" * 900, 0.0), Shown("two\nlines", "", "", math.nan)]
AFTER = [Shown("two\nlines", "", "ok", 0.5), Shown("What is 1 + 1?", "2", "\x1b[2J2", 1.0), Shown("new", "3", "3", 1)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drive(view: View, clock: Clock, steps: int = 8) -> None:
    """A run as the loop tells it, with numbers that go wrong on the way."""
    view.start(
        "count", steps, "runs/count", {"model": "tiny", "parameters": "1.2M", "task": "chain_sum", "device": "cpu"}
    )
    for step in range(1, 4):
        clock.now += 1
        view.progress("sft", step, 3, {"loss": 1.0 / step, "grad_norm": math.nan})
    view.evaluation(0, {"eval/accuracy": 0.125, "eval/greedy": math.nan, "eval/failed": 0.0})
    for step in range(1, steps + 1):
        clock.now += 3
        view.phase("rollout")
        view.step(step, {**METRICS, "reward/mean": step / 10 if step != 3 else math.inf})
    view.evaluation(steps, {"eval/accuracy": 0.75})
    view.log("a message \x1b[31m with escapes")
    view.compare(BEFORE, AFTER)
    view.finish(SUMMARY)
    view.close()
    view.close()


def terminal(width: int, *, encoding: str = "utf-8") -> tuple[Console, io.TextIOWrapper]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return Console(file=stream, width=width, height=40, force_terminal=True, color_system=None), stream


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode(stream.encoding)


def rendered(board: Board, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(render(board, width))
    return capture.get().splitlines()


def board_after(steps: int) -> Board:
    clock = Clock()
    board = Board(clock=clock)
    board.start("count", 100, "runs/count", {"model": "tiny", "device": "cpu"})
    board.phase = "rollout"
    board.evaluated(0, {"eval/accuracy": 0.125})
    for step in range(1, steps + 1):
        clock.now += 2
        board.note("train", step, 100, {**METRICS, "reward/mean": step / 100})
    return board


# ── the live view ───────────────────────────────────────────────────────────────────────────────────────


def test_live_snapshot_at_80() -> None:
    assert [line.rstrip() for line in rendered(board_after(8), 80)] == [
        "count · rollout",
        "model tiny · device cpu",
        "train 8/100 ━━━╸                                              16s · 3m04s left",
        "reward   0.080 ▁▂▃▄▅▆▇█",
        "eval    0.125 (step 0)",
        "rollout tok/s  12.3k  train tok/s       1M",
        "lag              0.0  mismatch     1.2e-07",
        "dropped            3  KL             0.001",
        "entropy          1.5  loss           -0.01",
        "grad norm        0.3",
    ]


def test_live_snapshot_at_20() -> None:
    lines = [line.rstrip() for line in rendered(board_after(8), 20)]
    assert lines[:5] == [
        "count · rollout",
        "model tiny · device…",
        "train 8/100 16s · 3…",
        "reward   0.080 ▁▃▆█",
        "eval    0.125 (step…",
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("steps", [0, 1, 100])
def test_no_line_is_wider_than_the_terminal(width: int, steps: int) -> None:
    lines = rendered(board_after(steps), width)
    assert max(cell_len(line) for line in lines) <= width
    assert len(lines) <= 16


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(20, 300),
    text=st.text(max_size=80),
    values=st.lists(st.floats(), max_size=5),
    step=st.integers(-5, 10**9),
    stage=st.sampled_from(["train", "sft"]),
)
def test_any_run_can_be_drawn(width: int, text: str, values: list[float], step: int, stage: str) -> None:
    board = Board(clock=Clock())
    board.start(text, 10, text, {text: text})
    board.phase = text
    for value in values:
        board.note(stage, step, 10, {**dict.fromkeys(METRICS, value), text: value})
        board.evaluated(step, {"eval/accuracy": value, text: value})
    lines = rendered(board, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_whole_live_run(width: int) -> None:
    console, stream = terminal(width)
    clock = Clock()
    drive(LiveView(console, refresh_per_second=0, board=Board(clock=clock)), clock)
    text = written(stream)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "\\x1b[2J" in plain.replace("\n", "") or width < 27, "model output cannot steer the terminal"
    assert "\x1b[2J2" not in text
    assert "eval     0.100 before, 0.900 after" in plain or width < 40
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden once and given back"


def test_a_live_view_with_its_refreshing_thread() -> None:
    console, stream = terminal(100)
    clock = Clock()
    view = LiveView(console, refresh_per_second=200, board=Board(clock=clock))
    drive(view, clock, steps=300)
    assert "300/300" in written(stream)


def test_names_are_no_markup() -> None:
    board = Board(clock=Clock())
    board.start("[/red]", 3, "runs", {"[b]": "[/b]"})
    board.note("sft", 1, 3, {"[/x]": 1.0})
    text = "\n".join(rendered(board, 80))
    assert "[/red]" in text
    assert "[b] [/b]" in text
    assert "[/x]" in text


def test_sft_alone_needs_no_start() -> None:
    console, stream = terminal(80)
    view = LiveView(console, refresh_per_second=0)
    view.progress("sft", 1, 3, {"loss": 2.0})
    view.progress("sft", 2, 3, {"loss": 1.5})
    view.close()
    assert "sft 2/3" in written(stream)
    assert "loss" in written(stream)


@pytest.mark.parametrize("width", [20, 100])
def test_a_terminal_that_goes_away_ends_the_view_only(width: int, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(io.StringIO):
        broken = False

        def write(self, text: str) -> int:
            if self.broken:
                raise OSError(5, "Input/output error")
            return super().write(text)

    stream = Broken()
    clock = Clock()
    view = LiveView(Console(file=stream, width=width, force_terminal=True), refresh_per_second=0)
    view.start("count", 3, "runs/count")
    stream.broken = True
    drive(view, clock)
    assert caplog.text.count("the live view ends, the run goes on") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode(
    encoding: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, stream = terminal(80, encoding=encoding)
    clock = Clock()
    drive(LiveView(console, refresh_per_second=0, board=Board(clock=clock)), clock)
    assert caplog.text.count("the live view ends, the run goes on") == 1
    monkeypatch.setattr(sys, "stdout", stream)
    assert isinstance(make_view(True), PlainView)
    assert f"the output's encoding is {stream.encoding}" in caplog.text


# ── the plain view ──────────────────────────────────────────────────────────────────────────────────────


def test_plain_snapshot() -> None:
    stream, clock = io.StringIO(), Clock()
    drive(PlainView(stream, every_seconds=5, board=Board(clock=clock)), clock, steps=4)
    assert stream.getvalue().splitlines() == [
        "count: 4 steps in runs/count · model tiny · parameters 1.2M · task chain_sum · device cpu",
        "sft   1/3  loss       1       - left",
        "sft   3/3  loss   0.333      0s left",
        "eval       0  accuracy 0.125  greedy -  failed 0",
        "train 1/4  reward   0.100  rollout tok/s   12.3k  train tok/s      1M  lag     0.0  mismatch 1.2e-07"
        "  dropped       3  KL   0.001  entropy     1.5  loss   -0.01  grad norm     0.3       - left",
        "train 3/4  reward   0.200  rollout tok/s   12.3k  train tok/s      1M  lag     0.0  mismatch 1.2e-07"
        "  dropped       3  KL   0.001  entropy     1.5  loss   -0.01  grad norm     0.3      3s left",
        "train 4/4  reward   0.400  rollout tok/s   12.3k  train tok/s      1M  lag     0.0  mismatch 1.2e-07"
        "  dropped       3  KL   0.001  entropy     1.5  loss   -0.01  grad norm     0.3      0s left",
        "eval       4  accuracy 0.75",
        "a message \\x1b[31m with escapes",
        "question  What is 1 + 1?  [= 2]",
        *(line for line in stream.getvalue().splitlines() if line.startswith("  before 0.00  xxx")),
        "  after  1.00  \\x1b[2J2",
        "question  two lines",
        "  before    -  ",
        "  after  0.50  ok",
        "question  new  [= 3]",
        "  before    -",
        "  after  1.00  3",
        "eval     0.100 before, 0.900 after",
        "greedy   0.200 before, - after",
        "steps    60 in 1h02m",
        "speed    5.43k tokens/s rollout, 1M train",
        "mismatch 1e-06 nats a token",
        "time     rollout 60%, train 40%",
    ]
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_plain_view_in_any_encoding(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    view = PlainView(stream)
    view.log("Antwort: ü — 数")
    drive(view, Clock())
    assert "8/8" in written(stream)


def test_a_closed_pipe_ends_the_plain_view_only(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    stream.close()
    drive(PlainView(stream), Clock())
    assert caplog.text.count("the view ends, the run goes on") == 1


def test_null_view_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    drive(NullView(), Clock())
    assert capsys.readouterr().out == ""
    assert isinstance(make_view(), PlainView), "standard output is no terminal here"
    assert isinstance(make_view(False), PlainView)
    assert isinstance(make_view(True), LiveView)


# ── answers side by side ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", WIDTHS)
def test_compare_fits_any_width(width: int) -> None:
    assert all(len(line) <= width for line in compare_text(BEFORE, AFTER, width=width).splitlines())
    if fits_table(width):
        console = Console(file=io.StringIO(), width=width, color_system=None)
        with console.capture() as capture:
            console.print(compare_table(BEFORE, AFTER))
        lines = capture.get().splitlines()
        assert all(cell_len(line) <= width for line in lines)
        assert "…" in capture.get(), "a long answer is shortened in its middle"
        assert "\x1b[2J" not in capture.get()


def test_compare_pairs_answers_by_prompt() -> None:
    text = compare_text([Shown("a", "1", "x", 0), Shown("a", "1", "y", 0)], [Shown("a", "1", "z", 1)])
    assert [line.split("  ")[-1] for line in text.splitlines() if line.startswith("  ")] == ["x", "z", "y", " -"]
    assert compare_text([], []) == ""


# ── the summary ─────────────────────────────────────────────────────────────────────────────────────────


def test_summary_lines_without_evaluation() -> None:
    empty = Summary(None, None, None, None, 0, 0.0, 0.0, 0.0, {}, math.nan, 0)
    assert summary_lines(empty) == [
        "steps    0 in 0s",
        "speed    0 tokens/s rollout, 0 train",
        "mismatch - nats a token",
    ]
