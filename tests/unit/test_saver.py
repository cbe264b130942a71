"""Checkpoints beside an event loop: written by a thread, waited for once, told of when they exist, never torn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from sluice.checkpoint.store import CheckpointStore
from sluice.errors import CheckpointError
from sluice.log import Kind, LogReader, LogWriter
from sluice.log.records import CheckpointRecord, FaultRecord
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.saver import Saver
from sluice.types import Version

SECONDS = 30.0


class Disk:
    """A folder's writer that stands still until it is let go on."""

    def __init__(self, text: str = "weights") -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._text = text

    def __call__(self, folder: Path) -> None:
        (folder / "half.txt").write_text(self._text)
        self.reached.set()
        assert self.go_on.wait(SECONDS)
        (folder / "whole.txt").write_text(self._text)


def full(folder: Path) -> None:
    (folder / "half.txt").write_text("half")
    raise OSError(28, "No space left on device")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with LogWriter(tmp_path / "log") as writer:
        yield Journal(writer)


def told(folder: Path, kind: Kind) -> list[Any]:
    return [entry.record for entry in LogReader(folder / "log").read(kinds=(kind,))]


def saver(folder: Path, journal: Journal, *, background: bool = True, apart: bool = True) -> Saver:
    return Saver(CheckpointStore(folder / "checkpoints", keep=2), journal, background=background, apart=apart)


def steps(folder: Path) -> list[int]:
    return [each.step for each in CheckpointStore(folder / "checkpoints", keep=2).all()]


def record(step: int) -> CheckpointRecord:
    return CheckpointRecord(step, Version(step))


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), SECONDS))


async def reached(disk: Disk) -> None:
    while not disk.reached.is_set():  # noqa: ASYNC110 - set by the other thread
        await asyncio.sleep(0.001)


def test_the_loop_goes_on_and_the_log_says_what_exists(tmp_path: Path, journal: Journal) -> None:
    """State that changes meanwhile is written as it was; nothing is in the log before the folder has its name."""

    async def body() -> None:
        disk, ours, state = Disk(), saver(tmp_path, journal), {"alive": ["g1"]}
        await ours.begin(4, state, {"model": disk}, record(4))
        await reached(disk)
        state["alive"].append("g2")
        await ours.look()
        assert ours.figures() == {}
        assert (steps(tmp_path), told(tmp_path, Kind.CHECKPOINT)) == ([], [])
        asyncio.get_running_loop().call_later(0.01, disk.go_on.set)  # only a loop that runs does this
        await ours.settle()
        assert told(tmp_path, Kind.CHECKPOINT) == [record(4)]
        (kept,) = CheckpointStore(tmp_path / "checkpoints", keep=2).all()
        kept.verify()
        assert kept.state() == {"alive": ["g1"]}
        assert list(ours.figures()) == ["checkpoint/write_seconds"]
        assert ours.figures() == {}
        ours.close()

    run(body)


def test_where_the_engine_is_in_this_process_waiting_lets_nothing_else_run(tmp_path: Path, journal: Journal) -> None:
    """How many turns an engine computes meanwhile would depend on the disk."""
    turns: list[int] = []

    async def body() -> None:
        disk, ours = Disk(), saver(tmp_path, journal, apart=False)
        await ours.begin(1, {}, {"model": disk}, record(1))
        loop = asyncio.get_running_loop()
        loop.call_soon(turns.append, 1)
        threading.Timer(0.05, disk.go_on.set).start()
        await ours.settle()
        assert turns == []
        assert steps(tmp_path) == [1]
        ours.close()

    run(body)


@pytest.mark.parametrize("apart", [True, False])
def test_in_the_foreground_it_exists_when_begin_returns(tmp_path: Path, journal: Journal, apart: bool) -> None:
    async def body() -> None:
        disk, ours = Disk(), saver(tmp_path, journal, background=False, apart=apart)
        disk.go_on.set()
        await ours.begin(1, {}, {"model": disk}, record(1))
        assert steps(tmp_path) == [1]
        with pytest.raises(CheckpointError, match="No space left"):
            await ours.begin(2, {}, {"model": full}, record(2))
        ours.close()

    run(body)
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("ask", ["settle", "look"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_failure_is_raised_once_by_who_asks_next(tmp_path: Path, journal: Journal, ask: str, apart: bool) -> None:
    async def body() -> None:
        ours = saver(tmp_path, journal, apart=apart)

        async def asked() -> None:
            while True:  # `look` does not wait
                await getattr(ours, ask)()
                await asyncio.sleep(0.001)

        await ours.begin(1, {}, {"model": lambda folder: None}, record(1))
        await ours.settle()
        await ours.begin(2, {}, {"model": full}, record(2))
        with pytest.raises(CheckpointError, match=r"checkpoint of step 2 could not be written.*No space left"):
            await asked()
        await ours.settle()
        await ours.look()
        ours.close()

    run(body)
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert told(tmp_path, Kind.CHECKPOINT) == [record(1)]
    assert told(tmp_path, Kind.FAULT) == []


def test_a_cancelled_wait_leaves_the_writing_to_be_finished(tmp_path: Path, journal: Journal) -> None:
    """Ctrl-C while the loop waits: what was begun is there when everything is closed."""

    async def body() -> None:
        disk, ours = Disk(), saver(tmp_path, journal)
        await ours.begin(3, {}, {"model": disk}, record(3))
        waiting = asyncio.create_task(ours.settle())
        await reached(disk)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        threading.Timer(0.05, disk.go_on.set).start()
        ours.close()
        assert steps(tmp_path) == [3]
        ours.close()

    run(body)
    assert told(tmp_path, Kind.CHECKPOINT) == [record(3)]


def test_a_failure_that_nobody_waits_for_is_in_the_log(tmp_path: Path, journal: Journal) -> None:
    """The run ends by something else: that is raised, and the log has both."""

    async def body() -> None:
        ours = saver(tmp_path, journal)
        await ours.begin(3, {}, {"model": full}, record(3))
        ours.close()

    run(body)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    (fault,) = told(tmp_path, Kind.FAULT)
    assert isinstance(fault, FaultRecord)
    assert "checkpoint of step 3 could not be written" in fault.what
    assert fault.where == "the checkpoint under way"
