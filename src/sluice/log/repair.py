"""Checking a log file, and the explicit repair of a damaged newest one to its last good record.

A crash never needs this: SQLite recovers from it by itself. Damage comes from a failing disk, a copy cut
short, or a hand in the file. A repair loses the records after the damage, so nobody does it unasked.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sluice.errors import LogError
from sluice.log.files import (
    Row,
    check_header,
    create_file,
    flush,
    insert,
    is_damage,
    log_files,
    number_of,
    reading,
    rows,
)
from sluice.log.lock import FolderLock


@dataclass(frozen=True, slots=True)
class Check:
    """What a file is worth: `last` good record, and the `problem` behind it; empty when there is none."""

    last: int
    problem: str


@dataclass(frozen=True, slots=True)
class Repair:
    """What `repair` did: the file, its last record now, what was wrong, where the damaged file is kept."""

    file: Path
    last: int
    problem: str
    damaged: Path


def check_file(path: Path) -> Check:
    """Read a whole file: the numbering and the digest of each row, then the structure of its pages.

    Raises LogError when the file is intact but of another schema, has no readable header, or cannot be
    reached.
    """
    last, problem = _first(path) - 1, ""
    for found in _scan(path):
        if isinstance(found, Row):
            last = found.seq
        else:
            problem = found
    return Check(last, problem)


def _first(path: Path) -> int:
    with reading(path, damaged=True) as connection:
        return check_header(connection, path)


def _scan(path: Path) -> Iterator[Row | str]:
    """The good rows of a file in order and, if there is one, the problem that ends them."""
    expected = _first(path)
    try:
        with reading(path, damaged=True) as connection:
            for row in rows(connection, "1", (), after=expected - 1):
                if row.seq != expected:
                    yield f"record {expected} is missing"
                    return
                if not row.intact:
                    yield f"record {expected} is not what was written"
                    return
                yield row
                expected += 1
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                yield f"its pages are inconsistent: {verdict}"
    except LogError as error:
        if not is_damage(error.__cause__):
            raise
        yield str(error.__cause__)


def unfinished_repair(folder: Path) -> None:
    """Raises LogError when a repair of this log was interrupted halfway."""
    for left in folder.glob("*.sqlite.repaired"):
        raise LogError(
            f"a repair of the log {folder} was interrupted: {left.name} is not in its place yet",
            hint="call sluice.log.repair(folder) again: it goes on where it stopped",
        )


def repair(folder: Path) -> Repair | None:
    """Rebuild the newest file from its records before the damage. Returns None when nothing is damaged.

    The damaged file stays in the folder as `NNNNNN.sqlite.damaged`. The records after the damage are lost
    to the run: a resume generates those episodes again. Interrupted at any moment, it can be called again.

    Raises:
        LogError: a run is writing the log, there is none, or the header of the newest file is unreadable.
    """
    lock = FolderLock(folder)
    try:
        files = log_files(folder)
        if not files:
            raise LogError(f"there is no log in {folder}")
        path = files[-1]
        repaired = Path(f"{path}.repaired")
        problem = "an interrupted repair"
        if not repaired.exists():
            check = check_file(path)
            if not check.problem:
                return None
            problem = check.problem
            _rebuild(path, repaired)
        _swap(path, repaired)
        return Repair(path, check_file(path).last, problem, Path(f"{path}.damaged"))
    except (sqlite3.Error, OSError) as error:
        raise LogError(f"the log {folder} could not be repaired: {error}", hint="free space, then again") from error
    finally:
        lock.release()


def _rebuild(path: Path, repaired: Path) -> None:
    """Write `repaired` with every record of `path` before the damage; it appears complete or not at all."""
    aside = path.parent / ".repair"
    aside.mkdir(exist_ok=True)
    with reading(path, damaged=True) as connection:
        first = check_header(connection, path)
        created = connection.execute("SELECT created FROM file").fetchone()[0]
    (aside / path.name).unlink(missing_ok=True)
    made = create_file(aside, number_of(path), first=first, at=created)
    with closing(sqlite3.connect(made, isolation_level=None)) as target:
        target.execute("BEGIN")
        for found in _scan(path):
            if isinstance(found, Row):
                insert(target, [found])
        target.execute("COMMIT")
    flush(made)
    made.rename(repaired)
    aside.rmdir()
    flush(path.parent)


def _swap(path: Path, repaired: Path) -> None:
    """Put `repaired` in the place of `path`. The old -wal must be gone before: SQLite would replay it."""
    damaged = Path(f"{path}.damaged")
    if not damaged.exists():
        os.link(path, damaged)
    wal, shm = Path(f"{path}-wal"), Path(f"{path}-shm")
    if wal.exists():
        wal.rename(f"{damaged}-wal")
    shm.unlink(missing_ok=True)
    repaired.replace(path)
    flush(path.parent)
