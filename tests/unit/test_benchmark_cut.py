"""Connections that are cut from outside: what both ends see, and what is said where it cannot be done."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
from benchmarks.cut import connections, end_connection

PEER = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60) as connection:
    try:
        print("read", connection.recv(1), flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""
STRANGER = """
import os
from benchmarks.cut import end_connection
if os.geteuid() == 0:
    os.setuid(65534)
end_connection(1, 0)
"""


@pytest.fixture
def pair() -> Iterator[tuple[subprocess.Popen[str], socket.socket, int]]:
    """A process, the other end of its only connection, and the port that it is connected to."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
        with subprocess.Popen([sys.executable, "-c", PEER, str(port)], stdout=subprocess.PIPE, text=True) as process:
            connection, _ = listening.accept()
            connection.settimeout(60)
            with closing(connection):
                yield process, connection, port
            process.kill()


def test_both_ends_of_a_closed_connection_read_its_end(pair: tuple[subprocess.Popen[str], socket.socket, int]) -> None:
    process, ours, port = pair
    (descriptor,) = connections(process.pid)
    assert end_connection(process.pid, descriptor)
    assert ours.recv(1) == b""
    assert process.communicate(timeout=60)[0] == "read b''\n"
    assert connections(os.getpid(), port=port) == []


def test_both_ends_of_a_connection_that_is_reset_are_told(
    pair: tuple[subprocess.Popen[str], socket.socket, int],
) -> None:
    process, ours, _ = pair
    assert end_connection(process.pid, connections(process.pid)[0], reset=True)
    with pytest.raises(ConnectionResetError):
        ours.recv(1)
    assert process.communicate(timeout=60)[0] == "ConnectionResetError\n"


def test_what_is_no_connection_is_left_alone(pair: tuple[subprocess.Popen[str], socket.socket, int]) -> None:
    """A file, a descriptor that is not there, a process that has ended."""
    process, ours, port = pair
    assert [ours.fileno()] == connections(os.getpid(), port=port)
    assert not end_connection(process.pid, 1)
    assert not end_connection(process.pid, 999)
    assert connections(process.pid) != []
    process.kill()
    process.wait(timeout=60)
    assert not end_connection(process.pid, 1)


def test_somebody_elses_process_is_an_error_that_says_what_it_takes() -> None:
    done = subprocess.run([sys.executable, "-c", STRANGER], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "a connection of process 1 cannot be ended from outside: Operation not permitted" in done.stderr
    assert "right to trace" in done.stderr
