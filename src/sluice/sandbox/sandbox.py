"""Runs a Python program that nobody has read: with limits, without secrets, to its end or its deadline.

What it does not do: there is no filter of system calls, so a hole in the kernel is a way out; memory is limited per
process and not in sum; and without namespaces (`isolation = "any"`) the program sees this machine's files, network
and processes as far as its user may.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sluice.config.sandbox import SandboxConfig
from sluice.errors import SandboxError
from sluice.sandbox.pipe import pipe

LAUNCHER = Path(__file__).with_name("launcher.py")
PROBE_SECONDS = 60.0
GRACE_SECONDS = 5.0
"""For a launcher to end what it has started."""
_SAYS = (("MemoryError", "memory"), ("OSError: [Errno 27]", "file"), ("OSError: [Errno 28]", "file"))
"""Ends of a traceback that name a limit: no memory, file too large, no space left."""
_FORK = ("BlockingIOError: [Errno 11]", "RuntimeError: can't start new thread")


class Ending(StrEnum):
    """How a program ended: by itself, at the deadline, or at a limit."""

    EXITED = "exited"
    TIMEOUT = "timeout"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class Confinement:
    """What a program was kept from: `own` or `none` where it was, `shared`, `same` or `open` where it was not."""

    processes: str
    network: str
    files: str
    user: str


@dataclass(frozen=True, slots=True)
class Ran:
    """A program that has ended.

    Attributes:
        code: exit code, minus the signal that killed it; None at the deadline and where output was too long.
        limit: which one was met: `cpu`, `memory`, `file`, `processes` or `output`; empty when none was. Memory, files
            and processes are read off the last line on stderr.
        stdout, stderr: as far as they came.
        confinement: None when it was ended from outside.
    """

    ending: Ending
    code: int | None
    limit: str
    stdout: str
    stderr: str
    confinement: Confinement | None


class _TooMuchOutput(Exception):  # noqa: N818 - the state is the name
    """More than the limit came on a stream."""


class Sandbox:
    """Runs programs, a few at once. They share nothing.

    Raises:
        SandboxError: no program can be confined here as the recipe wants it.
    """

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._slots = asyncio.Semaphore(config.concurrent or os.cpu_count() or 1)
        self._python = str(config.python or sys.executable)
        self._prefixes = _prefixes(self._python)
        self.confinement = self._probe()

    @property
    def exposed(self) -> str:
        """What of this machine a program can reach, in words; empty when it is fully confined."""
        held = self.confinement
        return ", ".join(
            name for name in ("processes", "network", "files") if getattr(held, name) not in ("own", "none")
        )

    async def run(self, program: str, *, stdin: str = "") -> Ran:
        """Run a program to its end.

        Args:
            program: Python source.
            stdin: all that it can read there.

        Raises:
            SandboxError: it could not be started; its own failures are in the result.
        """
        async with self._slots:
            with tempfile.TemporaryDirectory(prefix="sluice-sandbox-") as folder:
                command = self._prepare(Path(folder), program, stdin)
                return await self._run(command, Path(folder))

    def _probe(self) -> Confinement:
        """Run nothing, to see how far a program is confined here."""
        with tempfile.TemporaryDirectory(prefix="sluice-sandbox-") as folder:
            command = self._prepare(Path(folder), "", "")
            try:
                done = subprocess.run(
                    command, env={}, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                    timeout=PROBE_SECONDS, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise SandboxError(f"the sandbox did not start within {PROBE_SECONDS:g} s") from error
            report = _report(Path(folder), done.stderr)
        if report["code"] != 0:
            raise SandboxError(
                f"{self._python} ends with code {report['code']} in the sandbox: {done.stderr.strip()[-500:]}",
                hint="see sandbox.python and sandbox.memory_bytes",
            )
        return Confinement(**report["confined"])

    def _prepare(self, folder: Path, program: str, stdin: str) -> list[str]:
        """Write what the launcher needs; returns its command line."""
        folder.chmod(0o711)  # where the program is another user it must reach its files
        for name in ("program", "work", "root"):
            (folder / name).mkdir()
        (folder / "program" / "main.py").write_text(program, encoding="utf-8", errors="surrogatepass")
        (folder / "stdin").write_text(stdin, encoding="utf-8", errors="surrogatepass")
        limits = self._config.model_dump(include={*_LIMITS})
        spec = {
            "parent": os.getpid(),
            "command": [self._python, "-I", "-B", "/program/main.py"],
            "env": _ENVIRONMENT,
            "limits": limits,
            "prefixes": self._prefixes,
            "isolation": self._config.isolation,
            **{name: str(folder / name) for name in ("program", "work", "root", "stdin", "report")},
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        return [sys.executable, "-I", "-S", str(LAUNCHER), str(folder / "spec.json")]

    async def _run(self, command: list[str], folder: Path) -> Ran:
        out, err = bytearray(), bytearray()
        limit = self._config.output_bytes
        async with AsyncExitStack() as stack:
            (stdout, out_end), (stderr, err_end) = [await pipe(stack) for _ in range(2)]
            try:
                process = await asyncio.create_subprocess_exec(
                    *command, env={}, cwd=folder, stdin=asyncio.subprocess.DEVNULL, stdout=out_end, stderr=err_end,
                    start_new_session=True,
                )  # fmt: skip
            finally:
                os.close(out_end)
                os.close(err_end)
            ending = await self._to_its_end(process, [_pump(stdout, out, limit), _pump(stderr, err, limit)])
        said, complained = (bytes(each[:limit]).decode("utf-8", "replace") for each in (out, err))
        if ending is not Ending.EXITED:
            return Ran(ending, None, "output" if ending is Ending.LIMIT else "", said, complained, None)
        report = _report(folder, complained)
        met = _limit(report, complained, self._config.cpu_seconds)
        ending = Ending.LIMIT if met else Ending.EXITED
        return Ran(ending, report["code"], met, said, complained, Confinement(**report["confined"]))

    async def _to_its_end(
        self, process: asyncio.subprocess.Process, readers: Sequence[Coroutine[Any, Any, None]]
    ) -> Ending:
        """Wait until the program has ended and all is read, or end it."""
        pumps = [asyncio.create_task(reader) for reader in readers]
        try:
            async with asyncio.timeout(self._config.seconds):
                await asyncio.gather(*pumps)
                await process.wait()
        except TimeoutError:
            return Ending.TIMEOUT
        except _TooMuchOutput:
            return Ending.LIMIT
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await _end(process)
        return Ending.EXITED


_LIMITS = ("seconds", "cpu_seconds", "memory_bytes", "file_bytes", "folder_bytes", "processes", "open_files")
_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",  # its own, see the launcher
    "TMPDIR": "/tmp",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All of it: nothing is inherited."""


def _prefixes(python: str) -> list[str]:
    """Folders that the interpreter needs: its environment and its installation, and the way to it by symbolic links."""
    code = "import sys; print(sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, sep='\\n')"
    try:
        done = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"{python} cannot be run: {error}", hint="sandbox.python names an interpreter") from error
    folders = [*done.stdout.split("\n"), str(Path(python).parent)]
    real = [os.path.realpath(folder) for folder in folders if folder]
    return [folder for folder in dict.fromkeys([*folders, *real]) if folder and folder != "/"]


async def _pump(stream: asyncio.StreamReader, into: bytearray, limit: int) -> None:
    while chunk := await stream.read(65_536):
        into += chunk
        if len(into) > limit:
            raise _TooMuchOutput


async def _end(process: asyncio.subprocess.Process) -> None:
    """The launcher and all that it has started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _report(folder: Path, stderr: str) -> dict[str, Any]:
    """What the launcher wrote. Raises SandboxError when the program was never started."""
    file = folder / "report"
    text = file.read_text() if file.exists() else ""
    if not text:
        raise SandboxError(f"the sandbox ended without a word: {stderr.strip()[-500:] or 'it printed nothing'}")
    report: dict[str, Any] = json.loads(text)
    if "refused" in report:
        raise SandboxError(
            f"untrusted code cannot be confined here: {report['refused']}",
            hint="permit user namespaces (or run as root with CAP_SYS_ADMIN), or set sandbox.isolation = 'any' to run "
            "it with limits alone: it can then reach the network and what its user may read",
        )
    if "error" in report:
        raise SandboxError(f"the sandbox could not be set up: {report['error']}")
    return report


def _limit(report: Mapping[str, Any], stderr: str, cpu_seconds: int) -> str:
    code = int(report["code"])
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and report["cpu_seconds"] >= 0.9 * cpu_seconds:
        return "cpu"
    lines = stderr.rstrip().rsplit("\n", 1)
    last = lines[-1] if code else ""
    if last.startswith(_FORK):
        return "processes"
    return next((name for said, name in _SAYS if last.startswith(said)), "")
