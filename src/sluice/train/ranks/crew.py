"""Ranks that are started, called and ended together, as child processes. Nothing here knows what a rank does.

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
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FunctionType
from typing import Any

from sluice.errors import RanksLost, SluiceError, TrainError
from sluice.train.ranks.calls import Failure

GRACE_SECONDS = 5.0
"""After a first failure is known: how long others may still tell theirs, which may have come before it."""


class Crew(ABC):
    """All ranks of one trainer."""

    def __init__(self) -> None:
        self._ended = ""

    @property
    @abstractmethod
    def size(self) -> int: ...

    @abstractmethod
    def meeting(self, folder: Path) -> str:
        """Where the ranks find each other, new each time; see `RankSpec.meeting`. `folder` has room for a file."""

    @abstractmethod
    def _send(self, method: str, arguments: Mapping[int, tuple[Any, ...]], *, beside: bool = False) -> dict[Any, int]:
        """Begin a call at each rank that has arguments. Returns what its answer is waited for at, with the rank.

        Args:
            beside: in the second thread there.
        """

    @abstractmethod
    def _receive(self, calls: Mapping[Any, int], seconds: float) -> dict[Any, Any]:
        """Answers to some of `calls`, results and failures; none when nothing came within `seconds`."""

    @abstractmethod
    def _forget(self, call: Any) -> None:
        """Take no answer to a call beside the others any more: what comes later is none to another call."""

    @abstractmethod
    def _end(self) -> None:
        """End what still runs. Harmless when repeated."""

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], *, seconds: float) -> list[Any]:
        """Call `method` at every rank with its arguments; their answers, by rank.

        Raises:
            TrainError: a rank failed, died or did not answer in time: the first failure. All ranks are ended.
        """
        self._check_alive()
        calls = self._send(method, dict(enumerate(arguments)))
        deadline = time.monotonic() + seconds
        answers: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        while calls and (found := self._receive(calls, max(0.0, deadline - time.monotonic()))):
            for call, answer in found.items():
                rank = calls.pop(call)
                if not isinstance(answer, Failure):
                    answers[rank] = answer
                    continue
                failures[rank] = answer
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(answers) == self.size:
            return [answers[rank] for rank in range(self.size)]
        missing = sorted(calls.values())
        self._ended = f"rank {min(failures or missing)} failed"
        self._end()
        raise first_failure(failures, method, missing, seconds)

    def beside(self, method: str, *arguments: Any, ranks: Sequence[int], seconds: float) -> list[Any]:
        """Call `method` at some ranks, in a second thread there: `call` goes on meanwhile. Their answers, in order.

        One at a time, from any thread. The method must not need the other ranks.

        Raises:
            TrainError: it failed, a rank died or did not answer in time: the first failure, when all others have
                answered. No rank is ended.
        """
        self._check_alive()
        calls = self._send(method, dict.fromkeys(ranks, arguments), beside=True)
        deadline = time.monotonic() + seconds
        answers: dict[int, Any] = {}
        while calls and (found := self._receive(calls, max(0.0, deadline - time.monotonic()))):
            answers |= {calls.pop(call): answer for call, answer in found.items()}
        for call, rank in calls.items():
            self._forget(call)
            answers[rank] = silent(method, seconds)
        failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
        if failures:
            raise first_failure(failures, method, [], seconds)
        return [answers[rank] for rank in ranks]

    def _check_alive(self) -> None:
        if self._ended:
            raise TrainError(f"the ranks were ended: {self._ended}", hint="start the run again with --resume")

    def close(self) -> None:
        """End all ranks. Harmless when repeated."""
        self._ended = self._ended or "the trainer was closed"
        self._end()


@dataclass(slots=True)
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    beside: Connection
    log: Path

    def answer(self, connection: Connection) -> Any:
        """The next one that comes there: a result or a failure, its death too."""
        try:
            answer = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=GRACE_SECONDS)
            return Failure(time.time(), self._died(), "", ProcessLookupError, "")
        if isinstance(answer, Failure) and not answer.hint:
            hint = f"its output is in {self.log}; all ranks were ended: mend that and go on with --resume"
            return replace(answer, hint=hint)
        return answer

    def _died(self) -> str:
        """How it ended, when it did."""
        code = self.process.poll()
        if code is None:
            how = "lost its connection to the controller"
        else:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{how}; its output is in {self.log}"


class ProcessCrew(Crew):
    """See `Crew`.

    Args:
        size: how many ranks.
        folder: for their logs, `rank-N.log`.
        environment: variables of each rank over those of this process.
    """

    def __init__(self, size: int, folder: Path, environment: Sequence[dict[str, str]]) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._children: list[_Child] = []
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

    def _send(self, method: str, arguments: Mapping[int, tuple[Any, ...]], *, beside: bool = False) -> dict[Any, int]:
        messages = {rank: _pickled(method, each) for rank, each in arguments.items()}
        calls: dict[Any, int] = {}
        for rank, message in messages.items():
            child = self._children[rank]
            connection = child.beside if beside else child.connection
            with suppress(OSError):  # it is dead: told when its answer is read, with how
                connection.send_bytes(message)
            calls[connection] = rank
        return calls

    def _receive(self, calls: Mapping[Any, int], seconds: float) -> dict[Any, Any]:
        ready: list[Any] = [call for call in calls if call.closed] or wait(list(calls), timeout=seconds)
        return {call: self._children[calls[call]].answer(call) for call in ready}

    def _forget(self, call: Any) -> None:
        call.close()

    def _end(self) -> None:
        """The connections close, and with them the ranks; SIGKILL for one that does not follow."""
        for child in self._children:
            child.connection.close()
            child.beside.close()
        for child in self._children:
            try:
                child.process.wait(timeout=GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def silent(method: str, seconds: float) -> Failure:
    """What stands for the answer of a rank that gave none."""
    text = f"did not answer {method!r} within {seconds:g} s"
    return Failure(time.time(), text, "train.rank_seconds is the deadline", TimeoutError, "")


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
    (ours, theirs), (ours_beside, theirs_beside) = Pipe(), Pipe()
    paths = os.pathsep.join(path for path in sys.path if path)
    with theirs, theirs_beside, log.open("wb") as output:
        numbers = theirs.fileno(), theirs_beside.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "sluice.train.ranks.program", *map(str, numbers)],
            env={**os.environ, "PYTHONPATH": paths, **environment}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, pass_fds=numbers, start_new_session=True,
        )  # fmt: skip
    return _Child(rank, process, ours, ours_beside, log)


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
