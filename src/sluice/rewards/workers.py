"""Helper processes that answer questions one at a time, and are ended when they take too long."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WorkerLost(Exception):  # noqa: N818 - the state is the name
    """The process ended, or was ended at the deadline, before it answered.

    Attributes:
        code: its exit code, minus the signal that ended it; None at the deadline.
    """

    def __init__(self, code: int | None, said: str) -> None:
        super().__init__("did not answer in time" if code is None else f"ended with {code}: {said or 'no word'}")
        self.code = code


class _Worker:
    """One process: a line of JSON in, a line of JSON out. It inherits no environment and ends with its stdin."""

    def __init__(self, script: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(script)], env={"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Blocks until it has answered. Raises WorkerLost; it is of no use then."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        data, until = bytearray(), time.monotonic() + seconds
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._lost(process.wait())
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self._lost(None)
            chunk = os.read(process.stdout.fileno(), 65_536)
            if not chunk:
                self._lost(process.wait())
            data += chunk
        return json.loads(data)

    def _lost(self, code: int | None) -> None:
        said = self.close()
        raise WorkerLost(code, said)

    def close(self) -> str:
        """End the process; returns the last line it printed on stderr."""
        process = self._process
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            _, error = process.communicate()
            return error.decode(errors="replace").strip().rsplit("\n", 1)[-1][-300:]
        return ""


class Workers:
    """Up to `count` processes that run `script`, started when they are needed. Safe to use from several threads."""

    def __init__(self, script: Path, count: int) -> None:
        self._script = script
        self._slots = threading.BoundedSemaphore(count)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer of one of them. Blocks: call it in a thread.

        Args:
            question: JSON values.
            seconds: deadline of the answer, from when a process is free.

        Raises:
            WorkerLost: it ended or was ended; the next question gets a new process.
        """
        with self._slots:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                worker = _Worker(self._script)
            answer = worker.ask(question, seconds)
            self._idle.put(worker)
            return answer

    def close(self) -> None:
        """End those that are idle."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()
