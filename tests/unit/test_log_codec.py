"""Record bodies: what goes in comes out, bit for bit, and what cannot is refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.errors import LogError
from sluice.log import (
    CheckpointRecord,
    Disposition,
    DispositionRecord,
    Entry,
    EpisodeRecord,
    EvalRecord,
    FaultRecord,
    GroupRecord,
    Kind,
    Record,
    ResumeRecord,
    RewardRecord,
    RunRecord,
    TurnRecord,
    VersionRecord,
    to_json,
)
from sluice.log.codec import Codec
from sluice.log.records import RECORDS, keys
from sluice.types import (
    Author,
    Episode,
    Fork,
    GroupRequest,
    Message,
    Outcome,
    Prompt,
    Reward,
    Routes,
    SamplingParams,
    Segment,
    Turn,
    Version,
    VersionSpan,
    observed,
)


def same(one: Any, two: Any) -> bool:
    """Equality bit for bit, of types too; any NaN outside an array is the same NaN, and -0.0 is not 0.0."""
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    if is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(two, field.name)) for field in fields(one))
    if isinstance(one, Mapping):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(same(*pair) for pair in zip(one, two, strict=True))
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", two) or (one != one and two != two)
    return bool(one == two)


# ── episodes of every shape ─────────────────────────────────────────────────────────────────────────────

text = st.text(st.characters(), max_size=20)  # lone surrogates too: models write them
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
hashable = st.booleans() | st.integers() | text | st.tuples(st.integers(), text)
free = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(text | st.sampled_from(["$tuple", "$map"]), inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3)
    ),
    max_leaves=8,
)
metadata = st.dictionaries(text, free, max_size=3)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=st.integers(-1, 100),
    min_p=st.floats(0, 1),
    max_new_tokens=st.integers(1, 1 << 20),
    stop=st.lists(text, max_size=2).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 1 << 30), max_size=2).map(tuple),
)
prompts = st.builds(
    Prompt,
    id=text,
    task=text,
    messages=st.lists(st.builds(Message, text, text), max_size=3).map(tuple),
    answer=text,
    metadata=metadata,
)
versions = st.builds(Version, st.integers(0, 1 << 40), st.integers(0, 9))
token_ids = st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=12)


experts = st.lists(st.integers(0, 511), max_size=4).map(lambda row: np.array(row * 6, np.int16))
routes = st.builds(Routes, st.integers(0, 1 << 20), st.just(3), st.just(2), experts)


@st.composite
def sampled_turns(draw: st.DrawFn) -> Turn:
    ids = np.array(draw(token_ids), np.int32)
    n = len(ids)
    logprobs = st.lists(st.floats(width=32), min_size=n, max_size=n).map(lambda it: np.array(it, np.float32))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=3))) if n > 1 else []
    edges = [0, *cuts, n] if n else []
    spans = tuple(VersionSpan(a, b, draw(versions)) for a, b in pairwise(edges))
    cut_off = draw(st.none() | logprobs)
    return Turn(
        Author.SAMPLED, ids, draw(logprobs), spans, draw(samplings), draw(text), cut_off, draw(st.none() | routes)
    )


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    segments: list[Segment] = []
    lengths: list[int] = []
    for index in range(draw(st.integers(0, 4))):
        turns = tuple(draw(st.lists(token_ids.map(observed) | sampled_turns(), max_size=4)))
        fork = None
        if index and draw(st.booleans()):
            parent = draw(st.integers(0, index - 1))
            fork = Fork(parent, draw(st.integers(0, lengths[parent])), draw(text))
        segments.append(Segment(turns, fork))
        lengths.append((fork.position if fork else 0) + segments[-1].num_own_tokens)
    outcome = draw(st.sampled_from(Outcome))
    return Episode(
        draw(text), draw(text), draw(prompts), tuple(segments), outcome, draw(text), draw(text), draw(metadata)
    )


codec = Codec()


def through(record: Record) -> Record:
    return codec.decode(record.kind, codec.encode(record))


@given(episodes())
@settings(max_examples=150, deadline=None)
def test_episodes_come_back_bit_for_bit(episode: Episode) -> None:
    back = through(EpisodeRecord(episode))
    assert isinstance(back, EpisodeRecord)
    assert same(back.episode, episode)


@given(sampled_turns(), st.none() | st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_turns_of_unfinished_episodes_come_back_bit_for_bit(turn: Turn, bound: int | None) -> None:
    record = TurnRecord("g000017.2", "00ff", turn, bound)
    assert same(through(record), record)
    assert keys(record) == ("g000017.2", 17)


@given(st.builds(GroupRequest, ordinal=st.integers(0), prompt=prompts, n=st.integers(1, 64), sampling=samplings))
@settings(max_examples=50, deadline=None)
def test_group_requests_come_back(request: GroupRequest) -> None:
    assert same(through(GroupRecord(request)), GroupRecord(request))


@given(st.dictionaries(text, st.floats(allow_nan=False, allow_infinity=False), max_size=5))
@settings(max_examples=50, deadline=None)
def test_every_reward_component_comes_back(components: dict[str, float]) -> None:
    record = RewardRecord("e1", Reward(components, {name: value / 3 for name, value in components.items()}))
    assert same(through(record), record)


SMALL: list[Record] = [
    RunRecord("abc", 1 << 70, "0.1.0"),
    ResumeRecord(5, 812),
    DispositionRecord("e1", "g1", Disposition.TRAINED, 6, masked_tokens=2),
    DispositionRecord("e3", "g1", Disposition.EXCLUDED, reason="infra_failure"),
    VersionRecord(Version(6, 1), Version(5), "00ff"),
    VersionRecord(Version(0), None, "00ff"),
    CheckpointRecord(5, Version(5)),
    EvalRecord(5, Version(5), {"pass@1": 0.1, "len": float("nan")}, ("v1", "v2")),
    FaultRecord("engine died", "rank 0, generate, 5.0", "Traceback …\n\ud800"),
]


@pytest.mark.parametrize("record", SMALL, ids=lambda record: record.kind)
def test_small_records_come_back(record: Record) -> None:
    assert same(through(record), record)


def test_every_kind_has_a_record() -> None:
    assert set(RECORDS) == set(Kind)


def test_decoded_arrays_can_be_written_to() -> None:
    """As those of a live episode: what a resumed run reads must behave as what it would have generated."""
    back = through(EpisodeRecord(Episode("e", "g", PROMPT, (Segment((observed([1, 2]),)),), Outcome.ABORTED)))
    assert isinstance(back, EpisodeRecord)
    assert back.episode.segments[0].turns[0].ids.flags.writeable


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────

PROMPT = Prompt("p7", "calc", (Message("user", "1+1"),))


def episode_with(**changes: Any) -> EpisodeRecord:
    turn = changes.pop("turn", observed([1]))
    return EpisodeRecord(Episode("e1", "g1", PROMPT, (Segment((turn,)),), Outcome.COMPLETED, **changes))


def test_a_value_that_json_cannot_hold_is_refused_with_its_place() -> None:
    with pytest.raises(LogError, match=r"episode record of e1.*tools\.0\.seen is a builtins\.set"):
        codec.encode(episode_with(info={"tools": [{"seen": {1, 2}}]}))


def test_numpy_scalars_become_numbers() -> None:
    back = through(episode_with(info={"score": np.float32(0.5), "hits": np.int64(3), "ok": np.bool_(True)}))
    assert isinstance(back, EpisodeRecord)
    assert same(dict(back.episode.info), {"score": 0.5, "hits": 3, "ok": True})


def test_an_array_of_another_dtype_is_refused_not_rounded() -> None:
    turn = Turn(
        Author.SAMPLED,
        np.array([1], np.int32),
        np.array([-0.1], np.float32),
        (VersionSpan(0, 1, Version(0)),),
        SamplingParams(),
    )
    object.__setattr__(turn, "logprobs", np.array([-0.1], np.float64))  # past the check of `Turn` itself
    with pytest.raises(LogError, match=r"float32 .* is declared, this is float64"):
        codec.encode(episode_with(turn=turn))


@pytest.mark.parametrize(
    "record",
    [
        RunRecord("abc", "seven", "0.1"),  # type: ignore[arg-type]
        FaultRecord(None, "here"),  # type: ignore[arg-type]
        EvalRecord(1, Version(1), {"pass": "high"}),  # type: ignore[dict-item]
        DispositionRecord("e", "g", "dropped", reason="stale"),  # type: ignore[arg-type]
    ],
    ids=["int", "str", "float", "enum"],
)
def test_a_field_of_another_type_is_refused(record: Record) -> None:
    with pytest.raises(LogError, match="cannot be logged"):
        codec.encode(record)


def test_a_field_of_a_newer_sluice_is_not_dropped_silently() -> None:
    body = codec.encode(ResumeRecord(5, 812))
    with pytest.raises(ValueError, match="does not decode"):
        codec.decode(Kind.CHECKPOINT, body)


def test_dispositions_must_say_when_or_why() -> None:
    with pytest.raises(ValueError, match="without a step"):
        DispositionRecord("e", "g", Disposition.TRAINED)
    with pytest.raises(ValueError, match="without a reason"):
        DispositionRecord("e", "g", Disposition.DROPPED, 3)


# ── names and JSON ──────────────────────────────────────────────────────────────────────────────────────


def test_what_a_record_is_found_by() -> None:
    request = GroupRequest(17, PROMPT, 8, SamplingParams())
    episode = Episode(request.episode_id(2), request.id, PROMPT, (), Outcome.ABORTED)
    assert keys(GroupRecord(request)) == (None, 17)
    assert keys(EpisodeRecord(episode)) == ("g000017.2", 17)
    assert keys(RewardRecord("g000017.2", Reward({}, {}))) == ("g000017.2", 17)
    assert keys(DispositionRecord("g000017.2", "g000017", Disposition.TRAINED, 1)) == ("g000017.2", 17)
    assert keys(RewardRecord("eval-3.2", Reward({}, {}))) == ("eval-3.2", None)
    assert keys(ResumeRecord(1, 2)) == (None, None)


@given(episodes())
@settings(max_examples=50, deadline=None)
def test_json_lines_are_strict_json_and_lose_no_number(episode: Episode) -> None:
    line = json.dumps(to_json(Entry(7, 0.1, EpisodeRecord(episode))), allow_nan=False)
    back = json.loads(line)
    assert (back["seq"], back["at"], back["kind"]) == (7, 0.1, "episode")
    assert back["episode"]["id"] == episode.id
    for segment, read in zip(episode.segments, back["episode"]["segments"], strict=True):
        for turn, saw in zip(segment.turns, read["turns"], strict=True):
            assert saw["ids"] == turn.ids.tolist()
            if turn.logprobs is not None:
                numbers = np.array([float(number) for number in saw["logprobs"]], np.float32)
                np.testing.assert_array_equal(numbers, turn.logprobs)
                spans = [(span["start"], span["end"], Version.parse(span["version"])) for span in saw["spans"]]
                assert spans == list(turn.spans)


def test_a_reward_line_has_its_total() -> None:
    reward = Reward({"answer": 1.0, "format": 0.5}, {"answer": 1.0, "format": 0.5})
    line = to_json(Entry(2, 1.5, RewardRecord("e1", reward)))
    assert line["reward"] == {"components": dict(reward.components), "weights": dict(reward.weights), "notes": {}}
    assert line["total"] == 1.25
