"""Programs of the user's: started with a folder and an environment of their own, logged, ended by a deadline."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sluice.rollout.process import die_with, signal_group
from sluice.sandbox.pipe import pipe

LOG_BYTES = 8 * 1024**2
"""What is kept of a program's output; the rest is counted and thrown away."""
GRACE_SECONDS = 2.0
"""Between SIGTERM and SIGKILL, and for output that is still in the pipe."""
REDACTED = b"[session key]"
_LINE = 1_000


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended.

    Attributes:
        code: exit code, minus the signal that killed it; None when it missed its deadline and was ended.
        error: last line on stderr that is not blank, else on stdout.
        output: last line on stdout that is not blank.
    """

    code: int | None
    error: str
    output: str

    @property
    def fault(self) -> str:
        """Why it failed; empty for exit code 0."""
        if self.code == 0:
            return ""
        tail = f": {self.error}" if self.error else ""
        if self.code is not None and self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}{tail}"
        return f"ended with exit code {self.code}{tail}"


class _Log:
    """One file for both streams, without the secret."""

    def __init__(self, file: IO[bytes], secret: bytes) -> None:
        self._file, self._secret = file, secret
        self._left = LOG_BYTES

    async def pump(self, stream: asyncio.StreamReader) -> str:
        """Copy a stream to its end; returns its last line that is not blank."""
        held = b""
        lines: deque[bytes] = deque(maxlen=1)
        partial = b""
        while True:
            chunk = await stream.read(65_536)
            text = (held + chunk).replace(self._secret, REDACTED) if self._secret else held + chunk
            keep = _overlap(text, self._secret) if chunk else 0
            text, held = text[: len(text) - keep], text[len(text) - keep :]
            self._write(text)
            *whole, partial = (partial + text).split(b"\n")
            lines.extend(line for line in whole if line.strip())
            partial = partial[-_LINE:]
            if not chunk:
                last = partial if partial.strip() else (lines[0] if lines else b"")
                return last.decode(errors="replace").strip()[-_LINE:]

    def _write(self, text: bytes) -> None:
        if not self._left:
            return
        self._file.write(text[: self._left])
        self._left -= min(self._left, len(text))
        if not self._left:
            self._file.write(f"\n[output beyond {LOG_BYTES} bytes is left out]\n".encode())
        self._file.flush()


def _overlap(text: bytes, secret: bytes) -> int:
    """Length of the longest end of `text` that begins `secret`."""
    return next((n for n in range(min(len(secret) - 1, len(text)), 0, -1) if text.endswith(secret[:n])), 0)


async def run_program(
    command: Sequence[str], *, folder: Path, env: Mapping[str, str], log: Path, seconds: float, secret: str = ""
) -> Ended:
    """Run a program to its end, or to its deadline.

    It leads a process group of its own, which is ended with it, and dies with this process even when that is killed;
    a grandchild that leaves the group is beyond our reach.

    Args:
        folder: its working directory.
        env: its whole environment.
        log: file that its output is appended to.
        secret: text that is kept out of the log, where it stands in plain sight.

    Raises:
        OSError: it cannot be started.
    """
    async with AsyncExitStack() as stack:
        file = stack.enter_context(log.open("ab"))
        (out, out_end), (err, err_end) = [await pipe(stack) for _ in range(2)]
        try:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=folder, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=out_end, stderr=err_end,
                start_new_session=True, preexec_fn=die_with(os.getpid(), signal.SIGKILL),
            )  # fmt: skip
        finally:
            os.close(out_end)
            os.close(err_end)
        sink = _Log(file, secret.encode())
        pumps = [asyncio.ensure_future(sink.pump(stream)) for stream in (out, err)]
        try:
            code = await _wait(process, seconds)
            signal_group(process.pid, signal.SIGKILL)  # children that outlived it
            _, late = await asyncio.wait(pumps, timeout=GRACE_SECONDS)
            output, error = ("" if pump in late else pump.result() for pump in pumps)
        finally:
            if process.returncode is None:
                signal_group(process.pid, signal.SIGKILL)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(process.wait(), *pumps, return_exceptions=True)
    return Ended(code, error or output, output)


async def _wait(process: asyncio.subprocess.Process, seconds: float) -> int | None:
    try:
        async with asyncio.timeout(seconds):
            return await process.wait()
    except TimeoutError:
        signal_group(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                await process.wait()
        except TimeoutError:
            signal_group(process.pid, signal.SIGKILL)
            await process.wait()
        return None
