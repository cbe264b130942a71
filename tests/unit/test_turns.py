"""An episode that was under way goes on from its turns: what is kept, what answers, what is too old, what goes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from session_rig import CHAT, Script

from sluice.config.data import GateConfig
from sluice.data.gate import Gate
from sluice.log import Kind, LogReader, TurnRecord
from sluice.log.files import log_files
from sluice.orchestrate.turns import TurnLog, young_enough
from sluice.rollout.chat.base import ChatMessage
from sluice.rollout.engines import continuing as module
from sluice.rollout.engines.base import Finish, GenerateRequest, Generation
from sluice.rollout.engines.continuing import Continuing, as_turn
from sluice.rollout.runners.base import turn_noise
from sluice.rollout.session import Ask, Limits, Session
from sluice.types import Episode, Ids, Message, Prompt, SamplingParams, Version, VersionSpan
from sluice.weights.lineage import Born, Lineage

PROMPT = Prompt("p0", "talk", (Message("user", "one"),))
ID = "g000003.1"
SAID = ("first", "second", "third", "fourth")


def lineage(current: int = 0) -> Lineage:
    """0 ← 1 ← … ← current, and 2.1, which was abandoned, beside 2."""
    made = Lineage(
        [Born(Version(n), Version(n - 1) if n else None, str(n)) for n in range(10)]
        + [Born(Version(2, 1), Version(1), "other")]
    )
    made.current = Version(current)
    return made


@contextmanager
def process(
    folder: Path, engine: Script, *, finished: Sequence[str] = (), told: list[str] | None = None, **options: Any
) -> Iterator[Continuing]:
    """The engine of one process of a run. Leaving it writes nothing: it is as good as a kill."""
    tell = (told if told is not None else []).append
    turns = TurnLog(folder, gate=Gate(GateConfig(), 4), lineage=lineage(), tell=tell, **options)
    turns.recall(finished, 0)
    try:
        yield Continuing(engine, turns)
    finally:
        turns.close()


def session(engine: Continuing, id: str = ID, routes: bool = False) -> Session:
    noise = turn_noise(0, "p0", id)
    return Session(
        id=id, group_id=id.partition(".")[0], prompt=PROMPT, sampling=SamplingParams(max_new_tokens=40), engine=engine,
        chat=CHAT, limits=Limits(10_000), noise=noise, routes=routes,
    )  # fmt: skip


async def talk(one: Session, turns: int) -> Episode:
    """A conversation whose user says the same every time."""
    history = [ChatMessage("user", "one")]
    for number in range(turns):
        (choice,) = await one.ask(Ask(tuple(history)))
        history += [ChatMessage("assistant", choice.parsed.content), ChatMessage("user", f"and {number}")]
    return one.finish()


def records(folder: Path) -> list[TurnRecord]:
    return [e.record for e in LogReader(folder).read(kinds=(Kind.TURN,)) if isinstance(e.record, TurnRecord)]


def sampled(episode: Episode) -> list[list[int]]:
    return [turn.ids.tolist() for turn in episode.sampled_turns()]


def ids(*values: int) -> Ids:
    return np.asarray(values, np.int32)


ASKED = GenerateRequest(f"{ID}/0", ids(1, 2, 3), SamplingParams(), 7, routing_key=ID)


# ── what is kept, and what it answers ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("routes", [False, True], ids=["plain", "routed-experts"])
def test_a_killed_episode_goes_on_where_it_was(tmp_path: Path, routes: bool) -> None:
    async def main() -> None:
        first = Script(SAID)
        with process(tmp_path, first) as engine:
            engine.begin(ID)
            begun = await talk(session(engine, routes=routes), 3)
        assert [len(record.turn) for record in records(tmp_path)] == [len(a.ids) for a in first.answers[:2]]

        second = Script(SAID[2:])
        with process(tmp_path, second) as engine:
            engine.begin(ID)
            whole = await talk(session(engine, routes=routes), 4)
            assert [request.rid for request in second.requests] == [f"{ID}/2", f"{ID}/3"]
            tokens = sum(len(answer.ids) for answer in first.answers[:2])
            assert engine.figures() == {"session/reused_turns": 2, "session/reused_tokens": tokens}
            assert engine.figures() == {"session/reused_turns": 0, "session/reused_tokens": 0}
        assert sampled(whole)[:3] == sampled(begun)
        turns = list(whole.sampled_turns())
        for turn, answer in zip(turns, first.answers[:2], strict=False):
            assert turn.logprobs is not None
            assert turn.logprobs.tobytes() == answer.logprobs.tobytes()
            assert (turn.spans, turn.finish) == (answer.spans, answer.finish)
            assert (turn.routes is not None) is routes
        assert len(records(tmp_path)) == 3, "a turn that was kept is not kept twice"

    asyncio.run(main())


@pytest.mark.parametrize(
    "change",
    [
        {"ids": ids(1, 2, 4)},
        {"ids": ids(1, 2)},
        {"sampling": SamplingParams(temperature=0.5)},
        {"sampling": SamplingParams(max_new_tokens=127)},
        {"noise_key": 8},
        {"routing_key": "g000003.2"},
        {"routes_from": 0},
        {},
    ],
    ids=["other-tokens", "fewer-tokens", "temperature", "limit", "another-turn", "another-episode", "experts", "same"],
)
def test_only_the_same_request_is_answered(tmp_path: Path, change: dict[str, Any]) -> None:
    async def main() -> None:
        with process(tmp_path, Script(["first"])) as engine:
            engine.begin(ID)
            kept = await engine.generate(ASKED)
            await engine.keep()
        other = Script([[9, 9]])
        with process(tmp_path, other) as engine:
            asked = replace(ASKED, **change)
            for id in {ID, asked.routing_key}:
                engine.begin(id)
            heard: list[int] = []
            found = await engine.generate(replace(asked, on_tokens=heard.extend))
        assert heard == found.ids.tolist()
        if change:
            assert (found.ids.tolist(), len(other.requests)) == ([9, 9], 1)
        else:
            assert (found.ids.tolist(), len(other.requests)) == (kept.ids.tolist(), 0)

    asyncio.run(main())


def test_an_answer_is_given_once(tmp_path: Path) -> None:
    async def main() -> None:
        with process(tmp_path, Script(["first"])) as engine:
            engine.begin(ID)
            await engine.generate(ASKED)
            await engine.keep()
        again = Script([[9, 9], [8]])
        with process(tmp_path, again) as engine:
            engine.begin(ID)
            await engine.generate(ASKED)
            assert (await engine.generate(ASKED)).ids.tolist() == [9, 9]
            engine.begin(ID)  # the attempt failed: what it had may be why
            assert (await engine.generate(ASKED)).ids.tolist() == [8]

    asyncio.run(main())


def test_what_is_not_kept(tmp_path: Path) -> None:
    """Turns cut off, the last turn of an episode, one-turn episodes, and episodes that nobody trains."""

    async def main() -> None:
        script = Script(lambda request: "said")
        with process(tmp_path, script) as engine:
            script.finish = Finish.ABORT
            engine.begin(ID)
            await engine.generate(ASKED)
            script.finish = Finish.STOP
            for number in range(4):
                id = f"g00000{number}.0"
                engine.begin(id)
                await talk(session(engine, id), 1)
                engine.end(id)
            await talk(session(engine, "eval:p0"), 3)
            await engine.keep()
        assert records(tmp_path) == []

    asyncio.run(main())


def test_a_turn_whose_tool_takes_long_is_kept_by_the_next_request_of_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with process(tmp_path, Script(lambda request: "said")) as engine:
            engine.begin(ID)
            engine.begin("g000004.0")
            await engine.generate(ASKED)
            await engine.generate(replace(ASKED, routing_key="g000004.0"))
            assert records(tmp_path) == []
            monkeypatch.setattr(module, "HELD_SECONDS", -1.0)
            await engine.generate(replace(ASKED, routing_key="g000004.0"))
        assert [record.episode_id for record in records(tmp_path)] == ["g000004.0", ID]

    asyncio.run(main())


def test_what_the_runs_log_has_is_not_looked_for(tmp_path: Path) -> None:
    async def main() -> None:
        with process(tmp_path, Script(["first"])) as engine:
            engine.begin(ID)
            await engine.generate(ASKED)
            await engine.keep()
        with process(tmp_path, Script([[9]]), finished=[ID]) as engine:
            engine.begin(ID)
            assert (await engine.generate(ASKED)).ids.tolist() == [9]
        turns = TurnLog(tmp_path, gate=Gate(GateConfig(), 4), lineage=lineage(), tell=[].append)
        assert turns.recall((), 4) == 0, "groups before the oldest one alive are over"
        assert turns.recall((), 3) == 1
        turns.close()

    asyncio.run(main())


# ── age ─────────────────────────────────────────────────────────────────────────────────────────────────


def turn_of(bound: int | None, *versions: Version) -> TurnRecord:
    n = len(versions)
    spans = tuple(VersionSpan(at, at + 1, version) for at, version in enumerate(versions))
    drawn = Generation(ids(*range(n)), np.zeros(n, np.float32), spans, Finish.STOP)
    return TurnRecord(ID, "", as_turn(drawn, ASKED), bound)


@pytest.mark.parametrize(
    ("gate", "current", "record", "usable"),
    [
        ({"max_lag": 0}, 3, turn_of(0, Version(3)), True),
        ({"max_lag": 0}, 3, turn_of(0, Version(2)), False),
        ({"max_lag": 0}, 3, turn_of(0, Version(3), Version(4)), False),
        ({"max_lag": 2}, 3, turn_of(None, Version(1), Version(2), Version(3)), True),
        ({"max_lag": 2}, 4, turn_of(None, Version(1), Version(2), Version(3)), False),
        ({"max_lag": 2}, 3, turn_of(None, Version(2, 1)), True),
        ({"max_lag": 2}, 4, turn_of(None, Version(2, 1)), False),
        ({"max_lag": 2}, 3, turn_of(None, Version(11)), False),
        ({"max_lag": 2, "order": "dispatch"}, 3, turn_of(2, Version(1)), True),
        ({"max_lag": 2, "order": "dispatch"}, 3, turn_of(2, Version(2, 1)), False),
        ({"max_lag": 1, "order": "dispatch"}, 3, turn_of(2, Version(2)), False),
        ({"max_lag": 1, "order": "dispatch"}, 3, turn_of(None, Version(2)), False),
        ({"max_lag": 1, "order": "dispatch"}, 3, turn_of(2, Version(3)), True),
    ],
    ids=[
        "in-use", "lag-0", "half-of-it", "within", "one-token-beyond", "abandoned", "abandoned-and-old", "unknown",
        "wait", "wait-abandoned", "tighter-promise", "no-promise", "tighter-and-in-use",
    ],
)  # fmt: skip
def test_a_turn_that_is_too_old_is_drawn_again(
    gate: dict[str, Any], current: int, record: TurnRecord, usable: bool
) -> None:
    assert young_enough(Gate(GateConfig(**gate), 4), lineage(current))(record) is usable


def test_age_is_asked_when_the_turn_is_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        line = lineage(0)
        for said in ("first", "other"):
            script = Script([said])
            turns = TurnLog(tmp_path, gate=Gate(GateConfig(), 4), lineage=line, tell=[].append)
            turns.recall((), 0)
            engine = Continuing(script, turns)
            engine.begin(ID)
            line.current = Version(0 if said == "first" else 1)
            await engine.generate(ASKED)
            await engine.keep()
            turns.close()
            assert len(script.requests) == 1

    asyncio.run(main())


# ── the log of turns itself ─────────────────────────────────────────────────────────────────────────────


def test_files_are_removed_when_their_episodes_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.orchestrate.turns._EPISODES", 1)
    noise = lambda request: random.Random(request.rid).choices(range(5, 300), k=400)  # noqa: E731

    async def main() -> None:
        with process(tmp_path, Script(noise), rotate_bytes=64 << 10) as engine:
            last = "g000099.0"
            for number in range(90):
                engine.begin(id := f"g0000{number:02d}.0")
                await talk(session(engine, id), 3)
                if number == 40:  # a straggler begins here
                    engine.begin(last)
                    await engine.generate(replace(ASKED, routing_key=last))
                    await engine.keep()
                engine.end(id)
            left = records(tmp_path)
            assert 40 < len(left) < 180, "files before the straggler's are gone, it and what follows are there"
            assert last in {record.episode_id for record in left}
            engine.end(last)
            assert len(records(tmp_path)) < 60
            assert len(log_files(tmp_path)) == 1

    asyncio.run(main())


def cut_the_wal(folder: Path) -> None:
    """What an interrupted write leaves."""
    wal = folder / "000001.sqlite-wal"
    wal.write_bytes(wal.read_bytes()[:-1_000])


def garble(folder: Path) -> None:
    for file in folder.glob("*.sqlite*"):
        file.write_bytes(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize(("damage", "kept"), [(cut_the_wal, 2), (garble, 0)], ids=["torn-tail", "garbled"])
def test_a_damaged_log_of_turns_costs_turns_and_no_run(
    tmp_path: Path, damage: Callable[[Path], None], kept: int
) -> None:
    async def main() -> None:
        with process(tmp_path / "there", Script(SAID)) as engine:
            engine.begin(ID)
            for number in range(3):
                await engine.generate(replace(ASKED, noise_key=number))
                await engine.keep()
            # what a kill leaves is what lies there now; a close would take the -wal in
            (tmp_path / "turns").mkdir()
            for file in (tmp_path / "there").iterdir():
                (tmp_path / "turns" / file.name).write_bytes(file.read_bytes())
        damage(tmp_path / "turns")
        told: list[str] = []
        script = Script(lambda request: [9])
        with process(tmp_path / "turns", script, told=told) as engine:
            engine.begin(ID)
            for number in range(3):
                await engine.generate(replace(ASKED, noise_key=number))
            assert len(script.requests) == 3 - kept
            assert bool(told) is (kept == 0)
            await engine.keep()
        assert len(records(tmp_path / "turns")) == 3

    asyncio.run(main())
