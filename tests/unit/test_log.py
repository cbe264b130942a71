"""The log as its users see it: order, cursors, rotation, readers beside the writer, refusals."""

from __future__ import annotations

import multiprocessing
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sluice.errors import LogError
from sluice.log import (
    Disposition,
    DispositionRecord,
    EpisodeRecord,
    FaultRecord,
    GroupRecord,
    Kind,
    LogReader,
    LogWriter,
    Record,
    RewardRecord,
    drop_through,
)
from sluice.types import (
    Author,
    Episode,
    GroupRequest,
    Message,
    Outcome,
    Prompt,
    Reward,
    SamplingParams,
    Segment,
    Turn,
    Version,
    VersionSpan,
    observed,
)

PROMPT = Prompt("p7", "calc", (Message("user", "1+1"),), "2")
SMALL = 96 << 10
"""Bytes after which these tests rotate: a few dozen records a file."""


def request(ordinal: int) -> GroupRequest:
    return GroupRequest(ordinal, PROMPT, 2, SamplingParams())


def episode(ordinal: int, sample: int = 0, tokens: int = 8) -> EpisodeRecord:
    ids = np.random.default_rng(ordinal).integers(0, 1 << 17, tokens).astype(np.int32)
    turn = Turn(
        Author.SAMPLED,
        ids,
        (ids * -1e-5).astype(np.float32),
        (VersionSpan(0, tokens, Version(3)),),
        SamplingParams(temperature=0.8),
    )
    group = request(ordinal)
    segments = (Segment((observed([1, 10, 11]), turn)),)
    return EpisodeRecord(Episode(group.episode_id(sample), group.id, PROMPT, segments, Outcome.COMPLETED))


def fault(number: int) -> FaultRecord:
    return FaultRecord(f"fault {number}", "here", random.Random(number).randbytes(1500).hex())


def seqs(reader: LogReader, **options: object) -> list[int]:
    return [entry.seq for entry in reader.read(**options)]  # type: ignore[arg-type]


def test_order_and_cursor_go_on_over_rotation_and_reopening(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    acknowledged: list[int] = []
    for _ in range(3):
        with LogWriter(folder, rotate_bytes=SMALL) as writer:
            assert writer.cursor == len(acknowledged)
            for _ in range(40):
                at = len(acknowledged)
                acknowledged.append(writer.append(episode(at, tokens=300)))
                acknowledged += writer.append_many([episode(at + 1, tokens=300), fault(at + 2)])
    assert acknowledged == list(range(1, 361))
    files = sorted(path.name for path in folder.glob("*.sqlite"))
    assert len(files) > 3
    assert files == [f"{number:06d}.sqlite" for number in range(1, len(files) + 1)]
    reader = LogReader(folder)
    assert (reader.first, reader.latest) == (1, 360)
    assert seqs(reader) == acknowledged
    for cursor in (0, 1, 77, 180, 359, 360):
        assert seqs(reader, after=cursor) == acknowledged[cursor:]
    assert seqs(reader, after=100, limit=5) == [101, 102, 103, 104, 105]


def test_kinds_and_ordinals_are_found_in_order(tmp_path: Path) -> None:
    records: list[Record] = []
    for ordinal in range(60):
        group = request(ordinal)
        records += [GroupRecord(group), episode(ordinal, 0), RewardRecord(group.episode_id(0), Reward({}, {}))]
        records += [fault(ordinal), episode(ordinal, 1)]
    for ordinal in reversed(range(60)):  # decided in another order than generated
        id = request(ordinal).episode_id(0)
        records.append(DispositionRecord(id, request(ordinal).id, Disposition.TRAINED, 1))
    with LogWriter(tmp_path, rotate_bytes=SMALL) as writer:
        for record in records:
            writer.append(record)
    assert len(list(tmp_path.glob("*.sqlite"))) > 1
    reader = LogReader(tmp_path)
    kinds = (Kind.REWARD, Kind.EPISODE)
    expected = [seq for seq, record in enumerate(records, 1) if record.kind in kinds]
    assert seqs(reader, kinds=kinds) == expected
    assert seqs(reader, kinds=kinds, after=50) == [seq for seq in expected if seq > 50]
    tail = [entry.record for entry in reader.read(from_ordinal=57, kinds=(Kind.EPISODE,))]
    ids = [record.episode.id for record in tail if isinstance(record, EpisodeRecord)]
    assert ids == ["g000057.0", "g000057.1", "g000058.0", "g000058.1", "g000059.0", "g000059.1"]
    kinds_there = [entry.record.kind for entry in reader.read(from_ordinal=59)]
    assert kinds_there == [Kind.GROUP, Kind.EPISODE, Kind.REWARD, Kind.EPISODE, Kind.DISPOSITION]
    assert seqs(reader, kinds=()) == []


def test_episodes_by_id(tmp_path: Path) -> None:
    with LogWriter(tmp_path, rotate_bytes=SMALL) as writer:
        for number in range(80):
            writer.append(episode(number, tokens=500))
        writer.append(RewardRecord("g000003.0", Reward({"answer": 1.0}, {"answer": 1.0})))
    reader = LogReader(tmp_path)
    assert reader.episode("g000003.0").id == "g000003.0"
    assert set(reader.episodes(["g000000.0", "g000079.0", "nobody"])) == {"g000000.0", "g000079.0"}
    assert [(entry.seq, entry.record.kind) for entry in reader.about("g000003.0")] == [
        (4, Kind.EPISODE),
        (81, Kind.REWARD),
    ]
    with pytest.raises(LogError, match=r"episode nobody is not in the log"):
        reader.episode("nobody")


def test_the_clock_is_the_one_given(tmp_path: Path) -> None:
    ticks = iter(range(100))
    with LogWriter(tmp_path, clock=lambda: float(next(ticks))) as writer:
        writer.append(fault(1))
        writer.append_many([fault(2), fault(3)])
    assert [entry.at for entry in LogReader(tmp_path).read()] == [1.0, 2.0, 2.0]


# ── readers beside the writer ───────────────────────────────────────────────────────────────────────────


def test_a_record_is_readable_as_soon_as_append_returns(tmp_path: Path) -> None:
    reader = LogReader(tmp_path)
    with LogWriter(tmp_path, rotate_bytes=SMALL) as writer:
        for number in range(60):
            seq = writer.append(fault(number))
            assert reader.latest == seq
            assert seqs(reader, after=seq - 1) == [seq]


def test_a_read_ends_where_the_log_ended_when_it_began(tmp_path: Path) -> None:
    with LogWriter(tmp_path) as writer:
        writer.append_many([fault(1), episode(2), fault(3)])
        entries = LogReader(tmp_path).read(kinds=(Kind.FAULT, Kind.EPISODE))
        assert next(entries).seq == 1
        writer.append_many([episode(4), fault(5)])
        assert [entry.seq for entry in entries] == [2, 3]


def test_a_reader_in_another_process_sees_a_growing_prefix(tmp_path: Path) -> None:
    program = """
import random
import sys
from pathlib import Path
from sluice.log import FaultRecord, LogWriter
with LogWriter(Path(sys.argv[1]), rotate_bytes=96 << 10) as writer:
    print("open", flush=True)
    for number in range(0, 900, 3):
        writer.append_many([FaultRecord(str(number + k), "here", random.randbytes(900).hex()) for k in (1, 2, 3)])
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        reader = LogReader(tmp_path)
        cursor, polls = 0, 0
        while cursor < 900:
            writing = process.poll() is None
            polls += 1
            for entry in reader.read(after=cursor):
                assert entry.seq == cursor + 1
                assert isinstance(entry.record, FaultRecord)
                assert entry.record.what == str(entry.seq)
                cursor = entry.seq
            assert cursor % 3 == 0, "half a batch was visible"
            assert writing or cursor == 900
    assert process.returncode == 0
    assert polls > 1
    assert len(list(tmp_path.glob("*.sqlite"))) > 3


def test_a_slow_reader_keeps_its_place_while_the_log_rotates(tmp_path: Path) -> None:
    with LogWriter(tmp_path, rotate_bytes=SMALL) as writer:
        for number in range(20):
            writer.append(fault(number))
        entries = LogReader(tmp_path).read()
        assert next(entries).seq == 1
        for number in range(200):
            writer.append(fault(number))
        assert [entry.seq for entry in entries] == list(range(2, 21))
    assert LogReader(tmp_path).latest == 220
    assert len(list(tmp_path.glob("*.sqlite"))) > 1


def test_threads_may_share_the_writer(tmp_path: Path) -> None:
    acknowledged: list[list[int]] = [[] for _ in range(4)]
    with LogWriter(tmp_path, rotate_bytes=SMALL) as writer:

        def work(mine: list[int]) -> None:
            for number in range(40):
                mine.extend(writer.append_many([fault(number), fault(number)]))

        threads = [threading.Thread(target=work, args=(mine,)) for mine in acknowledged]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(seq for mine in acknowledged for seq in mine) == list(range(1, 321))
    assert seqs(LogReader(tmp_path)) == list(range(1, 321))


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    with LogWriter(tmp_path) as writer:
        with pytest.raises(LogError, match=f"process {os.getpid()} on .* is writing the log"):
            LogWriter(tmp_path)
        program = "import sys; from pathlib import Path; from sluice.log import *; LogWriter(Path(sys.argv[1]))"
        command = [sys.executable, "-c", program, str(tmp_path)]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert other.returncode != 0
        assert f"process {os.getpid()} on" in other.stderr
        assert writer.append(fault(1)) == 1
    with LogWriter(tmp_path) as writer:
        assert writer.append(fault(2)) == 2


def test_a_closed_writer_says_so(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path)
    writer.close()
    writer.close()
    for call in (lambda: writer.append(fault(1)), writer.sync):
        with pytest.raises(LogError, match="is closed"):
            call()


def test_an_unstorable_record_takes_its_batch_with_it_and_nothing_else(tmp_path: Path) -> None:
    with LogWriter(tmp_path) as writer:
        writer.append(fault(1))
        with pytest.raises(LogError, match="cannot be logged"):
            writer.append_many([fault(2), FaultRecord("x", 3)])  # type: ignore[arg-type]
        with pytest.raises(LogError, match="not written"):
            writer.append(RewardRecord("\ud800", Reward({}, {})))
        assert writer.append(fault(2)) == 2
    assert seqs(LogReader(tmp_path)) == [1, 2]


def test_no_log_is_not_an_empty_log(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="there is no log"):
        LogReader(tmp_path / "nowhere").read()
    with LogWriter(tmp_path):
        assert LogReader(tmp_path).latest == 0
        assert seqs(LogReader(tmp_path)) == []
        assert seqs(LogReader(tmp_path), after=0) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(LogError, match="cannot be opened"):
        LogWriter(tmp_path / "log")


def test_a_cursor_beyond_the_end_means_that_records_were_lost(tmp_path: Path) -> None:
    with LogWriter(tmp_path) as writer:
        writer.append(fault(1))
    with pytest.raises(LogError, match="ends at record 1, before the cursor 5"):
        LogReader(tmp_path).read(after=5)


def test_a_log_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    with LogWriter(tmp_path) as writer:
        writer.append(fault(1))
    with closing(sqlite3.connect(tmp_path / "000001.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    for use in (lambda: LogReader(tmp_path).latest, lambda: LogWriter(tmp_path)):
        with pytest.raises(LogError, match=r"has log schema 99, this Sluice reads and writes schema 1"):
            use()


def test_another_database_is_no_log(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "000001.sqlite")) as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(LogError, match="is not a log file of Sluice"):
        LogWriter(tmp_path)


# ── retention ───────────────────────────────────────────────────────────────────────────────────────────


def test_only_whole_old_files_are_dropped(tmp_path: Path) -> None:
    with LogWriter(tmp_path, rotate_bytes=SMALL) as writer:
        for number in range(200):
            writer.append(fault(number))
        reader = LogReader(tmp_path)
        before = sorted(tmp_path.glob("*.sqlite"))
        assert drop_through(tmp_path, 0) == []
        dropped = drop_through(tmp_path, 100)
        assert dropped == before[: len(dropped)]
        assert dropped
        assert 1 < reader.first <= 101
        assert seqs(reader) == list(range(reader.first, 201))
        assert seqs(reader, after=100) == list(range(101, 201))
        with pytest.raises(LogError, match="those from 1 on are gone"):
            seqs(reader, after=0)
        drop_through(tmp_path, 10_000)
        assert len(list(tmp_path.glob("*.sqlite"))) == 1
        assert writer.append(fault(201)) == 201
    with LogWriter(tmp_path) as writer:
        assert writer.cursor == 201


def test_a_missing_file_in_the_middle_is_noticed(tmp_path: Path) -> None:
    with LogWriter(tmp_path, rotate_bytes=SMALL) as writer:
        for number in range(200):
            writer.append(fault(number))
    (tmp_path / "000002.sqlite").unlink()
    with pytest.raises(LogError, match=r"files between 000001\.sqlite and 000003\.sqlite are missing"):
        LogReader(tmp_path).read()
    with pytest.raises(LogError, match="missing"):
        LogWriter(tmp_path)


# ── durability and throughput ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("durability", ["process", "power"])
def test_sync_returns_the_cursor(tmp_path: Path, durability: str) -> None:
    with LogWriter(tmp_path, durability=durability, rotate_bytes=SMALL) as writer:  # type: ignore[arg-type]
        for number in range(50):
            writer.append(fault(number))
            assert writer.sync() == number + 1


def test_a_forked_child_does_not_break_the_log(tmp_path: Path) -> None:
    """Data loaders fork: a child that never touches the writer must leave it intact."""
    with LogWriter(tmp_path) as writer:
        writer.append(fault(1))
        child = multiprocessing.get_context("fork").Process(target=os.getpid)
        child.start()
        child.join()
        assert writer.append(fault(2)) == 2
    assert seqs(LogReader(tmp_path)) == [1, 2]


def test_throughput_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [episode(number, tokens=64) for number in range(2048)]
    started = time.perf_counter()
    with LogWriter(tmp_path) as writer:
        for at in range(0, len(records), 256):
            writer.append_many(records[at : at + 256])
        write = time.perf_counter() - started
    started = time.perf_counter()
    assert sum(1 for _ in LogReader(tmp_path).read()) == len(records)
    read = time.perf_counter() - started
    size = sum(path.stat().st_size for path in tmp_path.glob("*.sqlite"))
    with capsys.disabled():
        print(
            f"\nlog: {len(records) / write:.0f} episodes/s written, {len(records) / read:.0f} read, "
            f"{size / len(records):.0f} bytes each (64 sampled tokens)"
        )
