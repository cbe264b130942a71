"""The log clauses of the worked example: the order of the records, and the resume from step 5."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sluice.log import (
    ACCOUNTED,
    Disposition,
    DispositionRecord,
    EpisodeRecord,
    Kind,
    LogReader,
    LogWriter,
    ResumeRecord,
    RewardRecord,
    VersionRecord,
    account,
)
from sluice.types import (
    Author,
    Episode,
    Fork,
    Message,
    Outcome,
    Prompt,
    Reward,
    SamplingParams,
    Segment,
    Turn,
    Version,
    VersionSpan,
    expand,
    observed,
)

PROMPT = Prompt("p7", "calc", (Message("user", "6 * 7 ="),), "42")
SAMPLING = SamplingParams(temperature=0.8)


def sampled(ids: list[int], logprobs: list[float], *spans: VersionSpan) -> Turn:
    return Turn(Author.SAMPLED, np.array(ids, np.int32), np.array(logprobs, np.float32), spans, SAMPLING, "stop")


V3, V4, V5 = Version(3), Version(4), Version(5)
S0 = Segment(
    (
        observed([1, 10, 11, 12]),
        sampled([20, 21, 22, 2], [-0.5, -1.0, -0.25, -0.125], VersionSpan(0, 2, V3), VersionSpan(2, 4, V4)),
        observed([30, 31]),
        sampled([23, 2], [-0.75, -0.0625], VersionSpan(0, 2, V4)),
    )
)
S1 = Segment(
    (observed([40, 41]), sampled([24, 25, 2], [-1.5, -0.5, -0.25], VersionSpan(0, 3, V4))),
    Fork(0, 8, "sub_agent"),
)
E1 = Episode("e1", "g1", PROMPT, (S0, S1), Outcome.COMPLETED)
E2_TURNS = (observed([1, 10, 11, 12]), sampled([26, 27, 2], [-0.3, -0.2, -0.1], VersionSpan(0, 3, V5)))
E2 = Episode("e2", "g1", PROMPT, (Segment(E2_TURNS),), Outcome.COMPLETED)
E3 = Episode("e3", "g1", PROMPT, (Segment(E2_TURNS),), Outcome.INFRA_FAILURE, "the sandbox died")
WEIGHTS = {"answer": 1.0, "format": 0.5}
R1 = Reward({"answer": 1.0, "format": 0.0}, WEIGHTS)
R2 = Reward({"answer": 0.0, "format": 0.0}, WEIGHTS)
DISPOSITIONS = (
    DispositionRecord("e1", "g1", Disposition.TRAINED, 6),
    DispositionRecord("e2", "g1", Disposition.TRAINED, 6),
    DispositionRecord("e3", "g1", Disposition.EXCLUDED, reason="infra_failure"),
)


def write(folder: Path) -> None:
    with LogWriter(folder) as writer:
        for episode, reward in ((E1, R1), (E2, R2)):
            writer.append(EpisodeRecord(episode))
            writer.append(RewardRecord(episode.id, reward))
        writer.append(EpisodeRecord(E3))
        writer.append_many(DISPOSITIONS)


def test_the_log_holds_the_example_in_order(tmp_path: Path) -> None:
    write(tmp_path)
    records = [entry.record for entry in LogReader(tmp_path).read()]
    assert [record.kind for record in records] == [
        *(Kind.EPISODE, Kind.REWARD, Kind.EPISODE, Kind.REWARD, Kind.EPISODE),
        *(Kind.DISPOSITION,) * 3,
    ]
    ids = [record.episode.id for record in records if isinstance(record, EpisodeRecord)]
    assert ids == ["e1", "e2", "e3"]
    assert [record for record in records if isinstance(record, RewardRecord)] == [
        RewardRecord("e1", R1),
        RewardRecord("e2", R2),
    ]
    assert tuple(records[5:]) == DISPOSITIONS


def test_the_episode_read_back_trains_as_the_one_written(tmp_path: Path) -> None:
    write(tmp_path)
    read = LogReader(tmp_path).episodes(["e1", "e2", "e3"])
    for episode in (E1, E2, E3):
        for ours, theirs in zip(expand(episode), expand(read[episode.id]), strict=True):
            assert ours.key == theirs.key
            np.testing.assert_array_equal(ours.ids, theirs.ids)
            assert ours.streams.keys() == theirs.streams.keys()
            for name in ours.streams:
                assert ours[name].dtype == theirs[name].dtype
                np.testing.assert_array_equal(ours[name], theirs[name])
    counts = [sample.num_trained_tokens for id in ("e1", "e2") for sample in expand(read[id])]
    assert counts == [6, 3, 3]
    assert read["e1"].segments[1].fork == Fork(0, 8, "sub_agent")
    assert read["e3"].outcome is Outcome.INFRA_FAILURE


def test_resumed_from_step_5_both_are_trained_again_and_once(tmp_path: Path) -> None:
    write(tmp_path)
    cursor = 0  # the checkpoint of step 5 stands before e1
    with LogWriter(tmp_path) as writer:
        for step in (6, 7):
            writer.append(VersionRecord(Version(step), Version(step - 1), f"bits of {step}"))
    reader = LogReader(tmp_path)
    again = [entry.record for entry in reader.read(after=cursor, kinds=(Kind.EPISODE, Kind.REWARD))]
    assert [record.kind for record in again] == [Kind.EPISODE, Kind.REWARD, Kind.EPISODE, Kind.REWARD, Kind.EPISODE]
    with LogWriter(tmp_path) as writer:
        writer.append(ResumeRecord(5, cursor))
        halfway = account(reader.read(kinds=ACCOUNTED))
        assert halfway.undecided == ("e1", "e2", "e3")
        assert halfway.abandoned == DISPOSITIONS
        writer.append(VersionRecord(Version(6, 1), Version(5), "other bits"))
        writer.append_many(DISPOSITIONS)
    found = account(reader.read(kinds=ACCOUNTED))
    assert found.complete
    assert found.trained_at(6) == ("e1", "e2")
