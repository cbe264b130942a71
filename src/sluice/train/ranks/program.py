"""The program of a rank: `python -m sluice.train.ranks.program FD BESIDE`, started by `ProcessCrew`.

It reads pickled calls from the connection FD and answers each with a pickled result or failure. The controller's end
of the connection is its life: when that closes, the rank ends at once, in the middle of a collective too. Calls that
come from BESIDE are answered there, by a second thread, whatever the rank is doing meanwhile.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from sluice.train.ranks.calls import Dispatcher, Failure, outcome


def read_calls(connection: Connection, calls: queue.SimpleQueue[bytes]) -> None:
    """Take calls in as they come, so that the controller's end is noticed whatever this rank is doing."""
    while True:
        try:
            calls.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


def answer_calls(dispatcher: Dispatcher, receive: Callable[[], bytes], connection: Connection) -> None:
    """One after the other, for ever."""
    while True:
        message = receive()
        answer = outcome(lambda: dispatcher.call(*pickle.loads(message)))  # noqa: B023  (it is called before the next)
        if isinstance(answer, Failure):
            print(answer.traceback, end="", file=sys.stderr, flush=True)
        connection.send_bytes(pickle.dumps(answer))


def answer_beside(dispatcher: Dispatcher, connection: Connection) -> None:
    """The same until the controller closes the connection."""
    with suppress(EOFError, OSError):
        answer_calls(dispatcher, connection.recv_bytes, connection)


def main() -> None:
    connection, beside = (Connection(int(number)) for number in sys.argv[1:3])
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    dispatcher = Dispatcher()
    threading.Thread(target=read_calls, args=(connection, calls), daemon=True).start()
    threading.Thread(target=answer_beside, args=(dispatcher, beside), daemon=True).start()
    answer_calls(dispatcher, calls.get, connection)


if __name__ == "__main__":
    main()
