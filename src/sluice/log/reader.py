"""Readers of a log: any number, in any process, while it is written. Each keeps its own cursor.

A reader takes no lock that a writer waits for and holds no transaction between two entries, so a slow one
costs the run nothing. What it has seen is committed and will not change.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from sqlite3 import Connection

from sluice.errors import LogError
from sluice.log.codec import Codec
from sluice.log.files import Row, check_header, last_seq, log_files, reading, rows
from sluice.log.records import Entry, EpisodeRecord, Kind
from sluice.types import Episode


class LogReader:
    """Reads the log in `folder`. Holds nothing open between calls; share it between threads freely."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def first(self) -> int:
        """`seq` of the oldest record that retention has left. Raises LogError when there is no log."""
        return self._bounds(self._files()[0])[0]

    @property
    def latest(self) -> int:
        """`seq` of the newest committed record, 0 for an empty log. Raises LogError when there is no log."""
        return self._bounds(self._files()[-1])[1]

    def read(
        self,
        *,
        after: int | None = None,
        kinds: Collection[Kind] | None = None,
        from_ordinal: int | None = None,
        limit: int | None = None,
    ) -> Iterator[Entry]:
        """Entries in the order they were appended, up to the newest when the iteration began.

        Args:
            after: cursor; entries with a greater `seq` are given. None: from the oldest there is.
            kinds: only these kinds; found through an index. None: all.
            from_ordinal: only episodes, rewards, dispositions and groups whose group ordinal is at least
                this; found through an index.
            limit: at most this many entries.

        Raises:
            LogError: there is no log; the cursor lies beyond its end (records were lost, or it is of another
                run) or before its beginning (retention dropped what follows it); a file is missing, damaged
                or of another schema.
        """
        files = self._files()
        latest = self._bounds(files[-1])[1]
        if after is not None and after > latest:
            raise LogError(
                f"the log {self.folder} ends at record {latest}, before the cursor {after}",
                hint="its newest records were lost, or the cursor is of another run: restore the log from a "
                "copy, or resume from an older checkpoint",
            )
        entries = self._entries(files, after, latest, kinds, from_ordinal)
        return entries if limit is None else islice(entries, limit)

    def episode(self, id: str) -> Episode:
        """A finished episode by its id. Raises LogError when it is not in the log."""
        found = self.episodes((id,))
        if id not in found:
            raise LogError(f"episode {id} is not in the log {self.folder}")
        return found[id]

    def episodes(self, ids: Iterable[str]) -> dict[str, Episode]:
        """Those of the episodes that are in the log, by id. The newest record wins if there are several."""
        missing = set(ids)
        found: dict[str, Episode] = {}
        for path in reversed(self._files()):
            for id in sorted(missing):
                for entry in self._about(path, id, Kind.EPISODE):
                    assert isinstance(entry.record, EpisodeRecord)
                    found[id] = entry.record.episode
            missing -= found.keys()
            if not missing:
                break
        return found

    def about(self, id: str) -> list[Entry]:
        """Every entry about an episode (itself, rewards, dispositions), in order; empty for an unknown id."""
        return self.about_all((id,))[id]

    def about_all(self, ids: Iterable[str]) -> dict[str, list[Entry]]:
        """The same for many episodes; each file is opened once."""
        found: dict[str, list[Entry]] = {id: [] for id in ids}
        for path in self._files():
            with reading(path) as connection:
                check_header(connection, path)
                codec = Codec()
                for id, entries in found.items():
                    entries += [_entry(path, row, codec) for row in rows(connection, "episode = ?", (id,), after=0)]
        return found

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────

    def _files(self) -> list[Path]:
        files = log_files(self.folder)
        if not files:
            raise LogError(f"there is no log in {self.folder}", hint="give the log/ folder of a run")
        return files

    def _bounds(self, path: Path) -> tuple[int, int]:
        """First number of a file, and its last record."""
        with reading(path) as connection:
            first = check_header(connection, path)
            return first, last_seq(connection, first)

    def _entries(
        self,
        files: list[Path],
        after: int | None,
        latest: int,
        kinds: Collection[Kind] | None,
        from_ordinal: int | None,
    ) -> Iterator[Entry]:
        start = self._start(files, after)
        reached = None if start else after  # a cursor inside a later file needs no older one
        for path in files[start:]:
            with reading(path) as connection:
                first = check_header(connection, path)
                if reached is not None and first > reached + 1:
                    raise LogError(
                        f"{path} begins at record {first}: those from {reached + 1} on are gone",
                        hint=f"read from the oldest one there is (after=None), or after={first - 1}",
                    )
                reached = last_seq(connection, first)
                codec = Codec()
                whole = kinds is None and from_ordinal is None
                expected = max(first, (after or 0) + 1)
                for row in _select(connection, after or 0, kinds, from_ordinal):
                    if row.seq > latest:
                        return
                    if whole and row.seq != expected:
                        raise _damaged(path, expected, "it is missing")
                    expected = row.seq + 1
                    yield _entry(path, row, codec)

    def _start(self, files: list[Path], after: int | None) -> int:
        """Index of the file that holds the record after the cursor."""
        if after is None:
            return 0
        for index in range(len(files) - 1, 0, -1):
            if self._bounds(files[index])[0] <= after + 1:
                return index
        return 0

    def _about(self, path: Path, id: str, kind: Kind | None) -> list[Entry]:
        with reading(path) as connection:
            check_header(connection, path)
            found = rows(connection, "episode = ?", (id,), after=0)
            codec = Codec()
            return [_entry(path, row, codec) for row in found if kind is None or row.kind == kind]


def _select(
    connection: Connection, after: int, kinds: Collection[Kind] | None, from_ordinal: int | None
) -> Iterator[Row]:
    """Rows in order through the index that fits: one scan per kind, merged, or the ordinals'."""
    if from_ordinal is not None:
        query = "SELECT seq, kind FROM record WHERE ordinal >= ? AND seq > ? ORDER BY seq"
        for seq, kind in connection.execute(query, (from_ordinal, after)).fetchall():
            if kinds is None or kind in kinds:
                yield from rows(connection, "seq = ?", (seq,), after=after)
        return
    if kinds is None:
        yield from rows(connection, "1", (), after=after)
        return
    scans = [rows(connection, "kind = ?", (str(kind),), after=after) for kind in sorted(kinds)]
    yield from heapq.merge(*scans, key=lambda row: row.seq)


def _entry(path: Path, row: Row, codec: Codec) -> Entry:
    problem = "" if row.intact else "its digest differs"
    if not problem:
        try:
            return Entry(row.seq, row.at, codec.decode(Kind(row.kind), row.body))
        except ValueError as error:
            problem = str(error)
    raise _damaged(path, row.seq, problem)


def _damaged(path: Path, seq: int, problem: str) -> LogError:
    return LogError(
        f"record {seq} in {path} is not what was written: {problem}",
        hint="restore the file from a copy; if it is the newest, sluice.log.repair keeps every record before",
    )
