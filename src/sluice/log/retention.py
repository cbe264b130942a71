"""Dropping old files of a log. Never done unasked: the log is the run's memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from sluice.log.files import check_header, discard, log_files, reading


def drop_through(folder: Path, cursor: int) -> list[Path]:
    """Remove the oldest files all of whose records have `seq <= cursor`; the newest file always stays.

    Safe while a run writes and others read: a reader that is inside a dropped file finishes it. Oldest
    first, so an interruption leaves no gap. A cursor of the oldest checkpoint that may still be resumed,
    or a lower one, keeps every resume possible.

    Returns:
        The files that were removed, oldest first.

    Raises:
        LogError: a file is damaged or missing, so that it is not certain what it holds.
    """
    files = log_files(folder)
    dropped: list[Path] = []
    for path, following in pairwise(files):
        with reading(following) as connection:
            last = check_header(connection, following) - 1
        if last > cursor:
            break
        discard(path)
        dropped.append(path)
    return dropped
