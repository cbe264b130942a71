"""The one writer of a log: append, commit, and only then return.

What survives what:

* The process dies at any moment (kill -9, a crash, out of memory): every record whose `append` returned is
  there, whole and once; a batch whose `append_many` had not returned is there as a whole or not at all.
* The machine loses power: the files stay consistent. With `durability="process"` (the default) the records
  of the last seconds may be gone, always the newest ones, unless `sync` has returned since; a checkpoint
  calls `sync` before it stores a cursor, so what it refers to is never lost. With `durability="power"` every
  append waits for the disk, and nothing acknowledged is lost.
* A torn end of the newest file's `-wal` (what an interrupted write leaves): SQLite's checksums find it, and
  the next writer goes on after the last whole transaction.
* A database file that is truncated or garbled: the writer checks the whole newest file when it opens, readers
  check every row they read; both raise LogError. `sluice.log.repair` keeps every record before the damage.
* Not noticed by the log alone: a newest file replaced by an older copy of itself, or a `-wal` deleted by
  hand. It then ends too early; a reader whose cursor lies beyond the end gets a LogError.
* Not survived: the log on a network file system. SQLite's WAL mode needs a local one.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

from sluice.errors import LogError
from sluice.log.codec import Codec
from sluice.log.files import (
    BUSY_SECONDS,
    Row,
    check_header,
    create_file,
    discard,
    flush,
    insert,
    last_seq,
    log_files,
    number_of,
)
from sluice.log.lock import FolderLock
from sluice.log.records import Record, keys
from sluice.log.repair import check_file, unfinished_repair

ROTATE_BYTES = 256 << 20
"""Size at which a new file is begun: small enough to check at start in a second, drop or copy away whole."""

Durability: TypeAlias = Literal["process", "power"]


class LogWriter:
    """Appends to the log in `folder`, which is made if need be. Safe to call from several threads.

    Args:
        folder: the `log/` folder of a run, on a local file system.
        rotate_bytes: a new file is begun before the append that follows this size. A batch is never split.
        durability: what an append waits for; see the module.
        clock: Unix time in seconds, stored with each record.

    Raises:
        LogError: another writer holds the folder (the message names its process), the newest file is
            damaged, a file is missing, or it is of another schema.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rotate_bytes: int = ROTATE_BYTES,
        durability: Durability = "process",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self._rotate_bytes = rotate_bytes
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self._clock = clock
        self._mutex = threading.Lock()
        self._codec = Codec()
        self._connection: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            flush(folder.parent)
            self._lock = FolderLock(folder)
        except OSError as error:
            raise LogError(f"the log {folder} cannot be opened: {error}", hint="check the run folder") from error
        try:
            self._path, self._connection, self._cursor = self._open(self._newest())
        except (sqlite3.Error, OSError) as error:
            self._lock.release()
            raise LogError(f"the log {folder} cannot be opened: {error}", hint="check the run folder") from error
        except BaseException:
            self._lock.release()
            raise

    @property
    def cursor(self) -> int:
        """`seq` of the last record appended, 0 for an empty log."""
        return self._cursor

    def append(self, record: Record) -> int:
        """Append one record and return its `seq`, after it is committed. Errors as in `append_many`."""
        return self.append_many((record,))[0]

    def append_many(self, records: Sequence[Record]) -> list[int]:
        """Append records in one transaction: all or none of them. Returns their `seq`s, after the commit.

        Raises:
            LogError: a record holds a value that cannot be stored, the disk is full or fails, or the writer
                is closed. None of these records is in the log then, all earlier ones are, and the same
                append may be tried again.
        """
        with self._mutex:
            if not records:
                return []
            now = float(self._clock())
            bodies = [self._codec.encode(record) for record in records]
            try:
                if self._bytes() >= self._rotate_bytes:
                    self._rotate(now)
                return self._commit(records, bodies, now)
            except (sqlite3.Error, OSError, UnicodeEncodeError) as error:
                raise self._not_written(records, error) from error

    def sync(self) -> int:
        """Force everything appended to the disk and return the cursor: no power cut can take it back.

        Call it before a cursor is stored elsewhere, in a checkpoint above all. Raises LogError.
        """
        with self._mutex:
            self._open_connection()
            try:
                self._flush()
            except OSError as error:
                raise LogError(f"the log {self._path} cannot be forced to disk: {error}") from error
            return self._cursor

    def close(self) -> None:
        """Let the folder go. Nothing is lost without it; a second call does nothing."""
        with self._mutex:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────

    def _newest(self) -> Path:
        """The newest file, checked; the first one is made if there is none."""
        unfinished_repair(self.folder)
        for left in self.folder.glob(".*.sqlite.tmp"):
            discard(left)
        files = log_files(self.folder)
        if not files:
            return create_file(self.folder, 1, first=1, at=float(self._clock()))
        check = check_file(files[-1])
        if check.problem:
            raise LogError(
                f"the newest log file {files[-1]} is damaged after record {check.last}: {check.problem}",
                hint="restore it from a copy, or keep the records up to there with sluice.log.repair(folder)",
            )
        return files[-1]

    def _open(self, path: Path) -> tuple[Path, sqlite3.Connection, int]:
        """Connect for writing. Returns the path, the connection and the last `seq`."""
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            last = last_seq(connection, check_header(connection, path))
            flush(path.parent)  # the -wal exists now: its name must outlive a power cut, too
        except BaseException:
            connection.close()
            raise
        return path, connection, last

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LogError(f"the log {self.folder} is closed", hint="open a new LogWriter")
        return self._connection

    def _bytes(self) -> int:
        """Size of the newest file with everything committed, in bytes."""
        connection = self._open_connection()
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        return int(pages) * int(connection.execute("PRAGMA page_size").fetchone()[0])

    def _commit(self, records: Sequence[Record], bodies: Sequence[bytes], now: float) -> list[int]:
        connection = self._open_connection()
        start = self._cursor + 1
        new = [
            Row.make(seq, now, record.kind, keys(record), body)
            for seq, (record, body) in enumerate(zip(records, bodies, strict=True), start)
        ]
        try:
            connection.execute("BEGIN IMMEDIATE")
            insert(connection, new)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            else:
                self._cursor = last_seq(connection, start)
        return [row.seq for row in new]

    def _flush(self) -> None:
        wal = Path(f"{self._path}-wal")
        if wal.exists():  # what is no longer in it was synced into the database by SQLite
            flush(wal)

    def _rotate(self, now: float) -> None:
        """Begin the next file. The full one is on disk before, so no power cut leaves a gap between them."""
        full = self._open_connection()
        full.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        self._flush()
        made = create_file(self.folder, number_of(self._path) + 1, first=self._cursor + 1, at=now)
        self._path, self._connection, self._cursor = self._open(made)
        full.close()

    def _not_written(self, records: Sequence[Record], error: Exception) -> LogError:
        names = [f"{record.kind} {keys(record)[0] or ''}".strip() for record in records[:3]]
        more = f" and {len(records) - 3} more" if len(records) > 3 else ""
        return LogError(
            f"{len(records)} records were not written to the log {self._path}: {error}. Not in the log: "
            f"{', '.join(names)}{more}. Everything up to record {self._cursor} is safe",
            hint="free space or mend the disk, then append again or resume the run: nothing recorded is lost",
        )
