"""Child programs of ours: engines and the router. Started, watched, and ended by their process group.

    start ──► running ──► ended by itself (`wait` returns; `last_error` says why)
                 └──────► `stop`: SIGTERM to the group, then SIGKILL

A child never outlives this process: the kernel sends it SIGTERM when the thread that started it dies, kill -9
included. That thread must be one that lives as long as the child should: the event loop's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import re
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

from sluice.config.sglang import Flag
from sluice.errors import EngineError

T = TypeVar("T")

POLL_SECONDS = 0.2
"""Between two questions whether a child is ready."""
PORT_ATTEMPTS = 5
TAKEN = re.compile(r"address already in use|port \d+ is (already )?(in use|taken|not available)", re.IGNORECASE)
TELLING = re.compile(r"\b\w*(Error|Exception|panic\w*)\b(?: at [^:]*)?:|\berror:|\bpanicked at\b", re.IGNORECASE)
"""Lines that say why a program ended: the last line of a traceback, of argparse, of a Rust panic."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class PortTaken(EngineError):  # noqa: N818 - the state is the name
    """The program could not listen: somebody else took the port. Another one is tried."""


@contextlib.contextmanager
def reserve_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A free TCP port of `host`, kept from every other Sluice on this machine while the block runs.

    For programs that cannot bind port 0 and tell. Leave the block when the program listens. Programs that do
    not ask here may still take it: see `start_on_port`.
    """
    while True:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        folder = Path(tempfile.gettempdir()) / f"sluice-ports-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        with (folder / str(port)).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield port
            return


async def start_on_port(begin: Callable[[int], Awaitable[T]], *, host: str = "127.0.0.1", port: int = 0) -> T:
    """Start a program on a free port, and on another when it was taken in between, `PORT_ATTEMPTS` times.

    Args:
        begin: starts it on the port it is given; raises PortTaken when it is taken.
        port: one that must be used; 0 for any.

    Raises:
        EngineError: the wanted port is taken, or five in a row were; else what `begin` raises.
    """
    if port:
        try:
            return await begin(port)
        except PortTaken as error:
            raise EngineError(
                f"port {port} of {host} is taken", hint="name another one, or 0 for any free one; nothing was started"
            ) from error
    for attempt in range(PORT_ATTEMPTS):
        with reserve_port(host) as free:
            try:
                return await begin(free)
            except PortTaken:
                if attempt == PORT_ATTEMPTS - 1:
                    raise
    raise AssertionError("unreachable")


def flags(values: Mapping[str, Flag]) -> Iterator[str]:
    """Words of a command line: `true` is the bare flag, `false` leaves it out, a list is several words."""
    for name, value in values.items():
        if value is False:
            continue
        yield f"--{name.lstrip('-').replace('_', '-')}"
        if isinstance(value, list):
            yield from value
        elif value is not True:
            yield str(value)


class ManagedProcess:
    """One child program in a process group of its own, its output in a file. Made by `start`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process
        self._ending = asyncio.Lock()

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log_path: Path,
        ready: Callable[[], Awaitable[bool]],
        seconds: float,
        progress: Callable[[str], None] | None = None,
        cwd: Path | None = None,
    ) -> ManagedProcess:
        """Start a program and wait until it is ready.

        Args:
            name: for messages.
            env: its whole environment.
            log_path: its stdout and stderr, overwritten.
            ready: asked again and again; a failed connection is False, not an exception.
            seconds: deadline.
            progress: told each line of its output while it starts.

        Raises:
            PortTaken: it ended because its port is in use.
            EngineError: it cannot be run, ended, or was not ready in time; with the end of its log.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log_path.open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *command, env=dict(env), cwd=cwd, stdin=asyncio.subprocess.DEVNULL, stdout=log,
                    stderr=asyncio.subprocess.STDOUT, start_new_session=True, preexec_fn=die_with(os.getpid()),
                )  # fmt: skip
        except OSError as error:
            raise EngineError(
                f"{name} could not be started: {error}", hint=f"its command line is: {' '.join(command)}"
            ) from error
        child = cls(name, process, log_path)
        try:
            await child._until_ready(ready, seconds, progress)
        except BaseException:
            await child.stop(grace=1.0)
            raise
        return child

    async def _until_ready(
        self, ready: Callable[[], Awaitable[bool]], seconds: float, progress: Callable[[str], None] | None
    ) -> None:
        with self.log_path.open(errors="replace") as log:
            try:
                async with asyncio.timeout(seconds):
                    while self.alive:
                        _tell(log, progress)
                        if await ready():
                            _tell(log, progress)
                            return
                        await asyncio.sleep(POLL_SECONDS)
            except TimeoutError as error:
                raise EngineError(
                    f"{self.name} was not ready within {seconds:g} s. The end of {self.log_path}:\n{self.tail()}",
                    hint="a longer deadline, or what its log complains about",
                ) from error
        await self._process.wait()
        kind = PortTaken if TAKEN.search(self.tail(80)) else EngineError
        raise kind(
            f"{self.name} ended with exit code {self.returncode} while it started: {self.last_error()}\n"
            f"The end of {self.log_path}:\n{self.tail()}",
            hint="mend what it complains about; its arguments come from the recipe",
        )

    @property
    def pid(self) -> int:
        """Of the process we started; its group has the same number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.returncode

    def tail(self, lines: int = 30) -> str:
        """The last lines of its output."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 64 * 1024))
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def last_error(self) -> str:
        """The line of its output that tells most about why it ended; its last line when none stands out."""
        lines = [line.strip() for line in self.tail(400).splitlines() if line.strip()]
        telling = [line for line in lines if TELLING.search(line)]
        return (telling or lines or ["it printed nothing"])[-1][:500]

    async def wait(self) -> int:
        """Until it ends, by itself or by `stop`. Returns its exit code."""
        return await self._process.wait()

    async def stop(self, grace: float = 10.0) -> None:
        """End it and what it started: SIGTERM to its group, SIGKILL after `grace` seconds. Harmless when repeated."""
        async with self._ending:
            if self.alive:
                signal_group(self.pid, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace):
                        await self._process.wait()
            signal_group(self.pid, signal.SIGKILL)  # children that did not follow their parent
            await self._process.wait()


def signal_group(leader: int, number: signal.Signals) -> None:
    """To exactly the process group that `leader` leads; nothing when all of it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


def _tell(log: IO[str], progress: Callable[[str], None] | None) -> None:
    for line in log:
        if progress is not None:
            progress(line.rstrip("\n"))


def die_with(parent: int, number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """What a child does before it becomes the program: ask the kernel to end it, by this signal, with its parent."""

    def ask() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(errno.ESRCH)

    return ask
