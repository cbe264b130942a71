"""Connections of another process, ended from outside while both ends live and believe in them.

A copy of the process's own socket is taken (`pidfd_getfd`, since Linux 5.6, with the right to trace the process), and
what is done to the copy is done to the connection: no proxy stands in between, and no packet filter is changed.

* closed: `shutdown` in both directions. Both ends read the end of the stream; what was on its way still arrives.
* reset: the socket is disconnected. Both ends get ECONNRESET; what was on its way is lost. TCP only.

What this does not cover: a connection that falls silent without ending. A frozen process is that, to its peers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from contextlib import closing

import psutil

_PIDFD_GETFD = 438
"""The same number on every architecture; Python has no name for it."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_UNSPECIFIED = bytes(16)
"""A `sockaddr` of the family AF_UNSPEC: to connect a TCP socket to it is to disconnect it."""
_GONE = {errno.EBADF, errno.ESRCH, errno.ENOTCONN, errno.ENOTSOCK}
"""The process, or this connection of it, had ended already."""


def connections(pid: int, *, port: int | None = None) -> list[int]:
    """Descriptors of a process's established TCP connections, in order; with `port` those at this end of its own.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    found = psutil.Process(pid).net_connections(kind="tcp")
    alive = [each for each in found if each.status == psutil.CONN_ESTABLISHED and each.fd >= 0]
    return sorted(each.fd for each in alive if port is None or each.laddr.port == port)


def end_connection(pid: int, descriptor: int, *, reset: bool = False) -> bool:
    """End one connection. Returns whether there was one to end.

    Raises:
        SystemExit: this host does not let it be done.
    """
    try:
        with closing(_copy(pid, descriptor)) as connection:
            connection.getpeername()  # ENOTCONN unless it is a connection
            if not reset:
                connection.shutdown(socket.SHUT_RDWR)
            elif _LIBC.connect(connection.fileno(), _UNSPECIFIED, len(_UNSPECIFIED)):
                raise _error()
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise SystemExit(
            f"a connection of process {pid} cannot be ended from outside: {error.strerror}. It takes pidfd_getfd, "
            "that is Linux 5.6 or later, and the right to trace the process (same user, see ptrace(2))"
        ) from error
    return True


def _copy(pid: int, descriptor: int) -> socket.socket:
    process = os.pidfd_open(pid)
    try:
        copy = _LIBC.syscall(_PIDFD_GETFD, process, descriptor, 0)
    finally:
        os.close(process)
    if copy < 0:
        raise _error()
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
