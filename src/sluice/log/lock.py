"""One writer per log: an advisory lock in the folder, dropped by the kernel when its process dies."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from sluice.errors import LogError


class FolderLock:
    """Held from construction to `release`.

    It keeps out every other LogWriter on this host, one in the same process too. It does not keep out other
    programs, nor, on a network file system without lock support, another host; SQLite's WAL mode needs a
    local file system in any case.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 300, 0).decode(errors="replace").strip() or "a process"
            os.close(self._descriptor)
            raise LogError(
                f"{holder} is writing the log {folder}: two runs cannot share one folder",
                hint="wait for that run or stop it, or give this one a folder of its own; if that process is "
                f"gone, a process it started still holds {path}",
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._descriptor)


def holder(folder: Path) -> str | None:
    """Who holds the lock of a log's folder, `process PID on HOST`; None when nobody does. Nothing is written."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "a process"
    else:
        return None
    finally:
        os.close(descriptor)
