"""The log under kill -9, a full disk and a damaged file. Nothing here is simulated by a mock."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sluice.errors import LogError
from sluice.log import EpisodeRecord, FaultRecord, LogReader, LogWriter, Repair, drop_through, repair

# ── kill -9 ─────────────────────────────────────────────────────────────────────────────────────────────

WRITE_FOREVER = """
import itertools, os, sys
from pathlib import Path
import numpy as np
from sluice.log import EpisodeRecord, LogWriter
from sluice.types import *

def record(seq, first, size):
    ids = np.random.default_rng(seq).integers(0, 1 << 17, seq % 700).astype(np.int32)
    turn = Turn(Author.SAMPLED, ids, ids.astype(np.float32) / -7, (VersionSpan(0, len(ids), Version(seq)),),
                SamplingParams())
    return EpisodeRecord(Episode(f"e{seq}", "g", Prompt("p", "t", ()), (Segment((turn,)),), Outcome.COMPLETED,
                                 info={"batch": (first, size)}))

writer = LogWriter(Path(sys.argv[1]), rotate_bytes=96 << 10)
for size in itertools.cycle((1, 2, 1, 5, 23)):
    first = writer.cursor + 1
    seqs = writer.append_many([record(first + k, first, size) for k in range(size)])
    os.write(1, f"{seqs[-1]}\\n".encode())
"""


def check_whole(folder: Path, acknowledged: int) -> int:
    """Every acknowledged record is there, once, in order, bit for bit, in whole batches. Returns the last."""
    last, batch = 0, (1, 0)
    for entry in LogReader(folder).read():
        assert entry.seq == last + 1
        last = entry.seq
        assert isinstance(entry.record, EpisodeRecord)
        episode = entry.record.episode
        assert episode.id == f"e{last}"
        turn = episode.segments[0].turns[0]
        expected = np.random.default_rng(last).integers(0, 1 << 17, last % 700).astype(np.int32)
        np.testing.assert_array_equal(turn.ids, expected)
        np.testing.assert_array_equal(turn.logprobs, expected.astype(np.float32) / -7)
        if last == sum(batch):
            batch = episode.info["batch"]
        assert episode.info["batch"] == batch
        assert batch[0] <= last < sum(batch)
    assert last >= acknowledged
    assert last == sum(batch) - 1, "a batch was cut in two"
    return last


def test_nothing_acknowledged_is_lost_or_doubled_by_kill_9(tmp_path: Path) -> None:
    chance = random.Random(20)
    acknowledged = 0
    for _ in range(6):
        command = [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(chance.randrange(1, 90)):
                acknowledged = int(process.stdout.readline())
            process.kill()
            for line in process.stdout:  # what it acknowledged before the kill reached it
                if line.endswith("\n"):
                    acknowledged = int(line)
        acknowledged = check_whole(tmp_path, acknowledged)  # by a reader, before any writer recovers
        with LogWriter(tmp_path) as writer:
            assert writer.cursor == acknowledged
    assert len(list(tmp_path.glob("*.sqlite"))) > 3, "the kills should have met rotation"


# ── a full disk ─────────────────────────────────────────────────────────────────────────────────────────

FILL = """
import os, resource, sys
from pathlib import Path
from sluice.errors import LogError
from sluice.log import FaultRecord, LogWriter

writer = LogWriter(Path(sys.argv[1]), rotate_bytes=256 << 20)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
written = 0
try:
    while True:
        writer.append_many([FaultRecord(f"{written + k}", "here", os.urandom(1000).hex()) for k in (1, 2, 3)])
        written += 3
except LogError as error:
    print(written, writer.cursor, str(error).replace("\\n", " "), sep="|")
try:
    writer.append_many([FaultRecord("in vain", "here", os.urandom(1000).hex()) for _ in range(60)])
except LogError:
    print("again")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for number in range(200):
    written += 1
    assert writer.append(FaultRecord(f"{written}", "here", os.urandom(1000).hex())) == written
print(written)
"""


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """The kernel refuses to write (EFBIG, as with a quota): the error says what is safe; later it goes on."""
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, again, total = done.stdout.splitlines()
    written, cursor, message = first.split("|")
    assert written == cursor
    assert "3 records were not written" in message
    assert f"Everything up to record {written} is safe" in message
    assert again == "again"
    whats = [entry.record.what for entry in LogReader(tmp_path).read() if isinstance(entry.record, FaultRecord)]
    assert whats == [str(number) for number in range(1, int(total) + 1)]


def test_a_file_that_cannot_be_begun(tmp_path: Path) -> None:
    noise = random.Random(3)
    obstacle = tmp_path / ".000002.sqlite.tmp"
    with LogWriter(tmp_path, rotate_bytes=64 << 10) as writer:
        (obstacle / "in the way").mkdir(parents=True)
        with pytest.raises(LogError, match="1 records were not written") as caught:  # noqa: PT012
            while True:
                writer.append(FaultRecord("x", "here", noise.randbytes(1000).hex()))
        assert f"Everything up to record {writer.cursor} is safe" in str(caught.value)
        (obstacle / "in the way").rmdir()
        obstacle.rmdir()
        before = writer.cursor
        assert writer.append(FaultRecord("x", "here")) == before + 1
        assert (tmp_path / "000002.sqlite").exists()
    assert [entry.seq for entry in LogReader(tmp_path).read()] == list(range(1, before + 2))


def test_a_full_disk(tmp_path: Path) -> None:
    """SQLite's own answer to ENOSPC, brought about by a page limit on the writer's connection."""
    writer = LogWriter(tmp_path)
    connection = writer._connection
    assert connection is not None
    connection.execute("PRAGMA max_page_count = 60")
    noise = random.Random(1)
    written = 0
    with pytest.raises(LogError) as caught:  # noqa: PT012 - how many appends fit is not ours to know
        while True:
            writer.append(FaultRecord(str(written + 1), "here", noise.randbytes(1000).hex()))
            written += 1
    assert "1 records were not written to the log" in str(caught.value)
    assert "database or disk is full" in str(caught.value)
    assert f"Everything up to record {written} is safe" in str(caught.value)
    assert writer.cursor == written == LogReader(tmp_path).latest
    connection.execute("PRAGMA max_page_count = 1000000")
    assert writer.append(FaultRecord("later", "here")) == written + 1
    writer.close()
    assert [entry.seq for entry in LogReader(tmp_path).read()] == list(range(1, written + 2))


# ── damaged files ───────────────────────────────────────────────────────────────────────────────────────


def noisy_log(folder: Path, records: int, *, rotate_bytes: int = 256 << 20) -> None:
    noise = random.Random(7)
    with LogWriter(folder, rotate_bytes=rotate_bytes) as writer:
        for number in range(1, records + 1):
            writer.append(FaultRecord(str(number), "here", noise.randbytes(400).hex()))


def readable(folder: Path) -> list[str]:
    return [entry.record.what for entry in LogReader(folder).read() if isinstance(entry.record, FaultRecord)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def garble_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in range(len(content) * 2 // 3 // 4096 * 4096, len(content), 4096):
        content[at : at + 64] = b"\xa5" * 64
    path.write_bytes(content)


def flip_a_bit_of_a_body(path: Path) -> None:
    """In the middle of a body: SQLite itself does not notice."""
    with closing(sqlite3.connect(path)) as connection:
        seq, body = connection.execute("SELECT seq, body FROM record ORDER BY seq DESC LIMIT 1 OFFSET 30").fetchone()
    content = path.read_bytes()
    at = content.index(body) + len(body) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert seq > 0


def remove_a_row(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM record WHERE seq = (SELECT max(seq) - 20 FROM record)")


def move_a_row(path: Path) -> None:
    """A record under another number is not the record that was written."""
    with closing(sqlite3.connect(path)) as connection, connection:
        last = connection.execute("SELECT max(seq) FROM record").fetchone()[0]
        connection.execute("UPDATE record SET seq = ? WHERE seq = ?", (last + 1, last - 20))
        connection.execute("UPDATE record SET seq = ? WHERE seq = ?", (last - 20, last))


DAMAGES = [truncate, garble_pages, flip_a_bit_of_a_body, remove_a_row, move_a_row]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("rotate_bytes", [256 << 20, 128 << 10], ids=["one file", "several"])
def test_a_damaged_newest_file_is_refused_then_repaired(tmp_path: Path, damage: object, rotate_bytes: int) -> None:
    noisy_log(tmp_path, 450, rotate_bytes=rotate_bytes)
    newest = sorted(tmp_path.glob("*.sqlite"))[-1]
    assert callable(damage)
    damage(newest)
    with pytest.raises(LogError, match=r"(?s)newest log file .* is damaged after record \d+: .*sluice\.log\.repair"):
        LogWriter(tmp_path)
    with pytest.raises(LogError, match=newest.stem):
        readable(tmp_path)
    done = repair(tmp_path)
    assert isinstance(done, Repair)
    assert done.file == newest
    assert done.problem
    assert done.damaged.exists()
    kept = readable(tmp_path)
    assert kept == [str(number) for number in range(1, done.last + 1)]
    assert 0 < len(kept) < 450
    with LogWriter(tmp_path) as writer:
        assert writer.append(FaultRecord("next", "here")) == done.last + 1
    assert repair(tmp_path) is None


def test_an_interrupted_repair_goes_on(tmp_path: Path) -> None:
    noisy_log(tmp_path, 100)
    newest = tmp_path / "000001.sqlite"
    good = newest.read_bytes()
    truncate(newest)
    (tmp_path / "000001.sqlite.repaired").write_bytes(good)  # complete, and not yet in its place
    with pytest.raises(LogError, match=r"a repair of the log .* was interrupted"):
        LogWriter(tmp_path)
    assert repair(tmp_path) is not None
    assert readable(tmp_path) == [str(number) for number in range(1, 101)]


def test_a_damaged_header_cannot_be_repaired_and_says_what_can_be_done(tmp_path: Path) -> None:
    noisy_log(tmp_path, 300, rotate_bytes=128 << 10)
    newest = sorted(tmp_path.glob("*.sqlite"))[-1]
    newest.write_bytes(b"\0" * 4096 + newest.read_bytes()[4096:])
    for use in (lambda: LogWriter(tmp_path), lambda: repair(tmp_path)):
        with pytest.raises(LogError, match="move it and its -wal out of the folder"):
            use()
    newest.unlink()
    with LogWriter(tmp_path) as writer:
        kept = writer.append(FaultRecord("next", "here"))
    assert 1 < kept < 300


def test_an_empty_newest_file(tmp_path: Path) -> None:
    noisy_log(tmp_path, 10)
    (tmp_path / "000001.sqlite").write_bytes(b"")
    with pytest.raises(LogError, match="is not a log file of Sluice"):
        LogWriter(tmp_path)


DIE_WITH_A_WAL = """
import os, signal, sys
from pathlib import Path
from sluice.log import FaultRecord, LogWriter
writer = LogWriter(Path(sys.argv[1]))
for number in range(1, 41):
    writer.append(FaultRecord(str(number), "here", os.urandom(300).hex()))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_torn_wal_is_recovered_to_its_last_whole_transaction(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DIE_WITH_A_WAL, str(tmp_path)], check=False)
    wal = tmp_path / "000001.sqlite-wal"
    (tmp_path / "000001.sqlite-shm").unlink()
    wal.write_bytes(wal.read_bytes()[:-5000] + b"\xa5" * 3000)
    kept = readable(tmp_path)
    assert kept == [str(number) for number in range(1, len(kept) + 1)]
    assert 0 < len(kept) < 40
    with LogWriter(tmp_path) as writer:
        assert writer.append(FaultRecord("next", "here")) == len(kept) + 1
    with pytest.raises(LogError, match="before the cursor 1000"):
        LogReader(tmp_path).read(after=1000)


def test_damage_in_an_older_file_stops_who_reads_it_and_nobody_else(tmp_path: Path) -> None:
    noisy_log(tmp_path, 450, rotate_bytes=128 << 10)
    truncate(tmp_path / "000001.sqlite")
    with pytest.raises(LogError, match=r"000001\.sqlite cannot be read"):
        readable(tmp_path)
    with LogWriter(tmp_path) as writer:
        assert writer.append(FaultRecord("next", "here")) == 451
    assert [entry.seq for entry in LogReader(tmp_path).read(after=450)] == [451]
    drop_through(tmp_path, 300)
    assert readable(tmp_path)[-1] == "next"
