"""The program of a rank: `python -m sluice.train.ranks.program FD`, started by `ProcessCrew`.

It reads pickled calls from the connection FD and answers each with a pickled result or failure. The controller's end
of the connection is its life: when that closes, the rank ends at once, in the middle of a collective too.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
from multiprocessing.connection import Connection

from sluice.train.ranks.calls import Dispatcher, Failure, outcome


def read_calls(connection: Connection, calls: queue.SimpleQueue[bytes]) -> None:
    """Take calls in as they come, so that the controller's end is noticed whatever this rank is doing."""
    while True:
        try:
            calls.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=read_calls, args=(connection, calls), daemon=True).start()
    dispatcher = Dispatcher()
    while True:
        answer = outcome(lambda: dispatcher.call(*pickle.loads(calls.get())))
        if isinstance(answer, Failure):
            print(answer.traceback, end="", file=sys.stderr, flush=True)
        connection.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
