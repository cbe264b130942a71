"""The files of a log: their names, schema and header, how one is made, read and checked.

    log/lock             held by the writer (flock); its content names the process
    log/000001.sqlite    and so on; each continues the numbering of the one before

Each file is an SQLite database in WAL mode with `record`, one row per record, and `file`, which says at
which number the file begins. A row carries a digest of all its columns, because SQLite does not checksum
its pages: a flipped bit is noticed when the row is read, never trained on.
"""

from __future__ import annotations

import os
import re
import sqlite3
import struct
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import xxhash

from sluice.errors import LogError

SCHEMA = 1
"""Version of tables and record encoding. One that differs is refused, not guessed at."""
APPLICATION = 0x534C5543
"""`SLUC`, SQLite's application id of our files."""
BUSY_SECONDS = 30.0
"""Longest wait for another connection. Readers never block the writer; only recovery after a kill locks."""
_CHUNK = 32
"""Rows fetched at once. Small, since an episode may be megabytes; the reader holds no lock in between."""

_NAME = re.compile(r"\d{6}\.sqlite")
_TABLES = f"""
    PRAGMA application_id = {APPLICATION};
    PRAGMA user_version = {SCHEMA};
    PRAGMA journal_mode = WAL;
    BEGIN;
    CREATE TABLE file (first INTEGER NOT NULL, created REAL NOT NULL);
    CREATE TABLE record (
        seq INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, episode TEXT, ordinal INTEGER,
        digest BLOB NOT NULL, body BLOB NOT NULL
    );
    CREATE INDEX record_kind ON record (kind);
    CREATE INDEX record_episode ON record (episode) WHERE episode IS NOT NULL;
    CREATE INDEX record_ordinal ON record (ordinal) WHERE ordinal IS NOT NULL;
"""
_COLUMNS = "seq, at, kind, episode, ordinal, digest, body"


class Row(NamedTuple):
    """One row of `record`. `body` is what `Codec.encode` returned."""

    seq: int
    at: float
    kind: str
    episode: str | None
    ordinal: int | None
    digest: bytes
    body: bytes

    @classmethod
    def make(cls, seq: int, at: float, kind: str, names: tuple[str | None, int | None], body: bytes) -> Row:
        """A row with its digest."""
        return cls(seq, at, kind, *names, _digest(seq, at, kind, *names, body), body)

    @property
    def intact(self) -> bool:
        """Whether every column is what was written."""
        try:
            return self.digest == _digest(self.seq, self.at, self.kind, self.episode, self.ordinal, self.body)
        except (TypeError, struct.error, AttributeError):  # a column of another type than was written
            return False


def _digest(seq: int, at: float, kind: str, episode: str | None, ordinal: int | None, body: bytes) -> bytes:
    hasher = xxhash.xxh3_64(struct.pack("<qdq", seq, at, -1 if ordinal is None else ordinal))
    hasher.update(f"{kind}\0{episode or ''}\0".encode())
    hasher.update(body)
    return hasher.digest()


def number_of(path: Path) -> int:
    """7 for `000007.sqlite`."""
    return int(path.stem)


def log_files(folder: Path) -> list[Path]:
    """The files of a log, oldest first. Raises LogError when one in the middle is missing."""
    found = sorted(path for path in folder.glob("*.sqlite") if _NAME.fullmatch(path.name))
    for before, after in pairwise(found):
        if number_of(after) != number_of(before) + 1:
            raise LogError(
                f"the log {folder} is incomplete: files between {before.name} and {after.name} are missing",
                hint="restore them; only the oldest files may be dropped, by sluice.log.drop_through",
            )
    return found


def create_file(folder: Path, number: int, *, first: int, at: float) -> Path:
    """Make an empty log file that begins at `first`: complete under its name, or not there at all."""
    final = folder / f"{number:06d}.sqlite"
    made = folder / f".{final.name}.tmp"
    discard(made)
    with closing(sqlite3.connect(made, isolation_level=None)) as connection:
        connection.executescript(_TABLES)
        connection.execute("INSERT INTO file VALUES (?, ?)", (first, at))
        connection.execute("COMMIT")
    flush(made)
    discard(final)  # a leftover -wal of this number would be replayed into the new file
    made.rename(final)
    flush(folder)
    return final


def discard(path: Path) -> None:
    """Remove a database with its companions, if it is there. The database goes first."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Force a file or folder to disk.

    Never call it for a database that has a connection in this process: closing any descriptor of it would
    drop SQLite's locks. Its `-wal` file carries none.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_header(connection: sqlite3.Connection, path: Path) -> int:
    """The number of the first record of a file. Raises LogError when it is not a log this Sluice reads."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    schema = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION:
        raise LogError(
            f"{path} is not a log file of Sluice: its header is missing or overwritten",
            hint=_HEADLESS,
        )
    if schema != SCHEMA:
        raise LogError(
            f"{path} has log schema {schema}, this Sluice reads and writes schema {SCHEMA}",
            hint="use the version of Sluice that wrote it, or a newer one",
        )
    return int(connection.execute("SELECT first FROM file").fetchone()[0])


def last_seq(connection: sqlite3.Connection, first: int) -> int:
    """Number of the last record, `first - 1` when the file holds none yet."""
    found = connection.execute("SELECT max(seq) FROM record").fetchone()[0]
    return first - 1 if found is None else int(found)


@contextmanager
def reading(path: Path, *, damaged: bool = False) -> Generator[sqlite3.Connection, None, None]:
    """A read-only connection, also while a writer is open. SQLite's errors become LogErrors.

    `damaged` lets SQLite read what there is of a file that is shorter than its header says. The body must not
    run code that may raise an sqlite3.Error of another database.
    """
    mode = "mode=ro"
    wal = Path(f"{path}-wal")
    if not os.access(path.parent, os.W_OK) and not (wal.exists() and wal.stat().st_size):
        mode = "immutable=1"  # an archive on read-only storage: nobody writes it, and no -shm can be made
    try:
        uri = f"{path.resolve().as_uri()}?{mode}"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            if damaged:
                connection.execute("PRAGMA writable_schema = ON")
            yield connection
    except sqlite3.Error as error:
        if not path.exists():
            raise LogError(f"{path} was removed while it was read", hint="read from the oldest record again") from error
        raise LogError(f"{path} cannot be read: {error}", hint=_next_move(error)) from error


_HEADLESS = (
    "restore it from a copy; if it is the newest file and there is no copy, move it and its -wal out of the "
    "folder: the log then ends with the file before it"
)


def is_damage(error: BaseException | None) -> bool:
    """Whether an error says that the bytes of a file are wrong, rather than that it cannot be reached."""
    damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR)
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in damage


def _next_move(error: sqlite3.Error) -> str:
    if not is_damage(error):
        return "check the folder and its permissions"
    if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
        return _HEADLESS
    return "restore it from a copy; if it is the newest file, sluice.log.repair keeps all before the damage"


def rows(connection: sqlite3.Connection, where: str, values: tuple[object, ...], *, after: int) -> Iterator[Row]:
    """Rows that satisfy `where`, by `seq`, a few at a time: no transaction is open while the caller works."""
    query = f"SELECT {_COLUMNS} FROM record WHERE {where} AND seq > ? ORDER BY seq LIMIT {_CHUNK}"
    while chunk := connection.execute(query, (*values, after)).fetchall():
        yield from (Row(*row) for row in chunk)
        after = chunk[-1][0]


def insert(connection: sqlite3.Connection, new: list[Row]) -> None:
    """Insert rows into the open transaction."""
    connection.executemany(f"INSERT INTO record ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", new)
