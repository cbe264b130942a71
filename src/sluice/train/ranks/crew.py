"""Ranks as child processes: started together, called together, ended together. Nothing here knows what a rank does.

call ──► all ranks ──► all answers
           │ one fails, dies or misses the deadline
           └─► the others, which wait for it in a collective, are ended; the first failure is raised
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol

from sluice.errors import RanksLost, SluiceError, TrainError

GRACE_SECONDS = 5.0
"""After a first failure is known: how long others may still tell theirs, which may have come before it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception of a rank.

    Attributes:
        at: Unix time.
        text, hint: what it says.
        kind: its class.
        traceback: as it is printed.
    """

    at: float
    text: str
    hint: str
    kind: type[BaseException]
    traceback: str


class Crew(Protocol):
    """All ranks of one trainer."""

    @property
    def size(self) -> int: ...

    def meeting(self, folder: Path) -> str:
        """Where the ranks find each other, new each time: a file in `folder`, or `tcp://host:port` of rank 0."""
        ...

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], *, seconds: float) -> list[Any]:
        """Call `method` at every rank with its arguments; their answers, by rank.

        Raises:
            TrainError: a rank failed, died or did not answer in time: the first failure. All ranks are ended.
        """
        ...

    def close(self) -> None:
        """End all ranks. Harmless when repeated."""
        ...


@dataclass(slots=True)
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path

    def died(self) -> str:
        """How it ended, when it did."""
        code = self.process.poll()
        if code is None:
            return ""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{how}; its output is in {self.log}"


class ProcessCrew:
    """See `Crew`.

    Args:
        size: how many ranks.
        folder: for their logs, `rank-N.log`.
        environment: variables of each rank over those of this process.
    """

    def __init__(self, size: int, folder: Path, environment: Sequence[dict[str, str]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._children: list[_Child] = []
        self._ended = ""
        try:
            for rank in range(size):
                self._children.append(_start(rank, folder / f"rank-{rank}.log", environment[rank]))
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return len(self._children)

    def meeting(self, folder: Path) -> str:
        """See `Crew.meeting`: all ranks are on this host."""
        return str(folder / "store")

    @property
    def pids(self) -> list[int]:
        return [child.process.pid for child in self._children]

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], *, seconds: float) -> list[Any]:
        """See `Crew.call`."""
        if self._ended:
            raise TrainError(f"the ranks were ended: {self._ended}", hint="start the run again with --resume")
        messages = [_pickled(method, each) for each in arguments]
        for child, message in zip(self._children, messages, strict=True):
            try:
                child.connection.send_bytes(message)
            except OSError:  # it is dead: told below, with how
                continue
        return self._answers(method, time.monotonic() + seconds, seconds)

    def _answers(self, method: str, deadline: float, seconds: float) -> list[Any]:
        answers: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        while len(answers) < self.size:
            left = {child.connection: child for child in self._children if child.rank not in answers.keys() | failures}
            ready = wait(list(left), timeout=max(0.0, deadline - time.monotonic())) if left else []
            if not ready:
                break
            for connection in ready:
                child = left[connection]  # type: ignore[index]
                answer = _receive(child)
                if isinstance(answer, Failure):
                    if not failures:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                    failures[child.rank] = answer
                else:
                    answers[child.rank] = answer
        if len(answers) == self.size:
            return [answers[rank] for rank in range(self.size)]
        missing = sorted({child.rank for child in self._children} - answers.keys() - failures.keys())
        self._ended = f"rank {min(failures, default=missing[0] if missing else 0)} failed"
        self.close()
        raise first_failure(failures, method, missing, seconds)

    def close(self) -> None:
        """End what still runs: the connections close, and with them the ranks; SIGKILL for one that does not follow."""
        self._ended = self._ended or "the trainer was closed"
        for child in self._children:
            child.connection.close()
        for child in self._children:
            try:
                child.process.wait(timeout=GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def first_failure(failures: dict[int, Failure], method: str, missing: Sequence[int], seconds: float) -> SluiceError:
    """The failure to show. A rank that died without a word comes before those that lost touch with it."""
    if not failures:
        ranks = ", ".join(str(rank) for rank in missing)
        return TrainError(
            f"rank {ranks} did not answer {method!r} within {seconds:g} s; all ranks were ended",
            hint="train.rank_seconds is the deadline; the ranks' output is in the run's folder under ranks/",
        )
    rank, first = min(failures.items(), key=lambda item: (item[1].kind is not ProcessLookupError, item[1].at))
    kind = first.kind if issubclass(first.kind, SluiceError) else TrainError
    if first.kind is ProcessLookupError:
        kind = RanksLost
    error = kind(
        f"rank {rank} of the trainer: {first.text}",
        hint=first.hint or "all ranks were ended; mend that and go on with --resume: finished episodes are in the log",
    )
    if first.traceback:
        error.add_note(f"at rank {rank}:\n{first.traceback}")
    return error


def _start(rank: int, log: Path, environment: dict[str, str]) -> _Child:
    ours, theirs = Pipe()
    paths = os.pathsep.join(path for path in sys.path if path)
    with theirs, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sluice.train.ranks.program", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": paths, **environment}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, pass_fds=(theirs.fileno(),), start_new_session=True,
        )  # fmt: skip
    return _Child(rank, process, ours, log)


class _Pickler(pickle.Pickler):
    """Refuses what a rank could not find: in its process another program is `__main__`."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and obj.__module__ == "__main__":
            raise TrainError(
                f"{obj.__qualname__!r} is defined in the program that was started, where the ranks cannot import it",
                hint="move it to a module, or to a file that the recipe names as file.py:name",
            )
        return NotImplemented


def _pickled(method: str, arguments: tuple[Any, ...]) -> bytes:
    stream = io.BytesIO()
    try:
        _Pickler(stream).dump((method, arguments))
        return stream.getvalue()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TrainError(
            f"what {method!r} needs cannot be sent to the ranks: {error}",
            hint="define the algorithm at the top level of its file, without lambdas or open files in it",
        ) from error


def _receive(child: _Child) -> Any:
    try:
        answer = pickle.loads(child.connection.recv_bytes())
        if isinstance(answer, Failure) and not answer.hint:
            hint = f"its output is in {child.log}; all ranks were ended: mend that and go on with --resume"
            return replace(answer, hint=hint)
        return answer
    except (EOFError, OSError):
        child.process.wait(timeout=GRACE_SECONDS)
        return Failure(time.time(), child.died(), "", ProcessLookupError, "")
