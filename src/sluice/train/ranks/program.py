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
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from sluice.errors import SluiceError
from sluice.train.ranks.crew import Failure


def failure(error: BaseException) -> Failure:
    """What the controller is told of an exception."""
    hint = error.hint if isinstance(error, SluiceError) else ""
    text = str(error.args[0]) if isinstance(error, SluiceError) else f"{type(error).__name__}: {error}"
    return Failure(time.time(), text, hint, type(error), traceback.format_exc())


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
    worker: Any = None
    while True:
        try:
            method, arguments = pickle.loads(calls.get())
            if method == "begin":
                from sluice.train.ranks.worker import RankWorker

                worker = RankWorker(*arguments)
                answer: Any = None
            else:
                answer = getattr(worker, method)(*arguments)
        except Exception as error:  # noqa: BLE001  (told to the controller, which raises it)
            traceback.print_exc()
            connection.send_bytes(pickle.dumps(failure(error)))
            continue
        connection.send_bytes(pickle.dumps(answer))
        if method == "close":
            return


if __name__ == "__main__":
    main()
