"""Rewards that compare: computed when a group is complete, logged, found again, and without failed members."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pydantic import ValidationError
from tests.tiny import tiny

from sluice.config.rewards import ExactReward, PythonGroupReward, RewardConfig
from sluice.errors import EngineError
from sluice.log import Kind, LogReader
from sluice.log.records import RewardRecord
from sluice.log.writer import LogWriter
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.producer import Producer
from sluice.orchestrate.recovery import logged_episodes
from sluice.orchestrate.stall import Stall
from sluice.rewards.rubric import Rubric
from sluice.rollout.runners.base import EpisodeRequest
from sluice.types import (
    Author,
    Episode,
    GroupRequest,
    Message,
    Outcome,
    Prompt,
    SamplingParams,
    Scored,
    Segment,
    Turn,
    Version,
    VersionSpan,
    observed,
)

RANKS = """
calls = []

def ranks(prompt, answers):
    "The longest answer gets 1, the shortest 0."
    calls.append((prompt.id, list(answers)))
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    scores = [0.0] * len(answers)
    for place, index in enumerate(order):
        scores[index] = place / max(len(answers) - 1, 1)
    return scores

async def slow(prompt, answers):
    import asyncio
    await asyncio.Event().wait()

def short(prompt, answers):
    return answers[1:]

def nan(prompt, answers):
    return [float("nan")] * len(answers)

def words(prompt, answers):
    return "0" * len(answers)
"""


class Letters:
    """A runner whose sample n answers n + 1 letters; the samples in `lost` are infra failures."""

    def __init__(self, lost: tuple[int, ...] = (), fault: int | None = None) -> None:
        self.lost, self.fault = lost, fault
        self.ran: list[str] = []
        self.hold: dict[int, asyncio.Event] = {}

    def admit(self, prompt: Prompt, max_new_tokens: int) -> None:
        return

    async def run(self, request: EpisodeRequest) -> Episode:
        sample = int(request.id.rpartition(".")[2])
        self.ran.append(request.id)
        if sample in self.hold:
            await self.hold[sample].wait()
        if sample == self.fault:
            raise EngineError("the engine is gone")
        ids = np.full(sample + 1, 97, np.int32)
        turn = Turn(
            Author.SAMPLED, ids, np.zeros(len(ids), np.float32), (VersionSpan(0, len(ids), Version(0)),),
            request.sampling, "stop",
        )  # fmt: skip
        lost = sample in self.lost
        return Episode(
            request.id, request.group_id, request.prompt, (Segment((observed([1]), turn)),) if not lost else (),
            Outcome.INFRA_FAILURE if lost else Outcome.COMPLETED, "the host died" if lost else "",
        )  # fmt: skip


class Spelled:
    """Ids as characters. `three` is set when three answers have been scored."""

    def __init__(self) -> None:
        self.count, self.three = 0, asyncio.Event()

    def text(self, ids: Any) -> str:
        self.count += 1
        if self.count == 3:
            self.three.set()
        return "".join(map(chr, ids))


REQUEST = GroupRequest(3, Prompt("p", "t", (Message("user", "?"),), "aa"), 4, SamplingParams())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(RANKS)
    return path


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[LogWriter]:
    with LogWriter(tmp_path / "log") as writer:
        yield writer


def make(
    writer: LogWriter,
    configs: list[RewardConfig],
    runner: Letters,
    recovered: Mapping[str, Any] | None = None,
    spelled: Spelled | None = None,
) -> Producer:
    return Producer(
        cast("Any", runner), Rubric(configs), cast("Any", spelled or Spelled()), Journal(writer), seed=0,
        recovered=recovered or {}, refusal=lambda version, due: "", stall=Stall(20),
    )  # fmt: skip


async def take(producer: Producer, count: int) -> dict[str, Scored]:
    taken = [await producer.next() for _ in range(count)]
    return {scored.episode.id: scored for scored in taken}


def rewarded(folder: Path) -> dict[str, RewardRecord]:
    records = [entry.record for entry in LogReader(folder).read(kinds=(Kind.REWARD,))]
    assert len({r.episode_id for r in records if isinstance(r, RewardRecord)}) == len(records), "one record each"
    return {r.episode_id: r for r in records if isinstance(r, RewardRecord)}


def both(file: Path, name: str = "ranks") -> list[RewardConfig]:
    return [ExactReward(), PythonGroupReward(name="rank", path=f"{file}:{name}", weight=0.5)]


def test_a_group_is_compared_when_complete_and_logged_as_a_whole(file: Path, writer: LogWriter, tmp_path: Path) -> None:
    async def main() -> None:
        runner, spelled = Letters(), Spelled()
        runner.hold[3] = asyncio.Event()
        producer = make(writer, both(file), runner, spelled=spelled)
        producer.start(REQUEST, range(4))
        await spelled.three.wait()
        assert producer.running == 4, "three are finished and wait for the fourth"
        assert not rewarded(tmp_path / "log")
        runner.hold[3].set()
        got = await take(producer, 4)
        totals = [got[f"g000003.{n}"].reward.total for n in range(4)]  # type: ignore[union-attr]
        assert totals == pytest.approx([0, 1 + 0.5 / 3, 1 / 3, 0.5])
        logged = rewarded(tmp_path / "log")
        assert {id: r.reward for id, r in logged.items()} == {id: s.reward for id, s in got.items()}
        assert logged["g000003.1"].reward.components == {"exact": 1.0, "rank": pytest.approx(1 / 3)}

    asyncio.run(main())


def test_failed_members_are_left_out(file: Path, writer: LogWriter, tmp_path: Path) -> None:
    async def main() -> None:
        producer = make(writer, both(file), Letters(lost=(0, 3)))
        producer.start(REQUEST, range(4))
        got = await take(producer, 4)
        assert [got[f"g000003.{n}"].reward is None for n in range(4)] == [True, False, False, True]
        assert got["g000003.2"].reward.components["rank"] == 1.0  # type: ignore[union-attr]
        producer.start(GroupRequest(4, REQUEST.prompt, 1, SamplingParams()), [0])
        assert (await producer.next()).reward is None, "nobody is left to compare"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("slow", "took longer than 0.05 s"),
        ("short", "returned 3 scores for 4 answers"),
        ("nan", "returned float nan, which is no finite number"),
        ("words", "returned str '0000', not a list of floats"),
    ],
)
def test_a_comparison_that_fails_is_no_zero(
    file: Path, writer: LogWriter, tmp_path: Path, name: str, said: str
) -> None:
    async def main() -> None:
        config = PythonGroupReward(path=f"{file}:{name}", seconds=0.05)
        producer = make(writer, [config], Letters())
        producer.start(REQUEST, range(4))
        for scored in (await take(producer, 4)).values():
            assert scored.episode.outcome is Outcome.INFRA_FAILURE
            assert said in scored.episode.reason
            assert scored.episode.info["failed_in"] == "reward"
        assert not rewarded(tmp_path / "log")
        assert len(list(LogReader(tmp_path / "log").read(kinds=(Kind.FAULT,)))) == 1

    asyncio.run(main())


def test_a_member_that_raises_ends_the_run_and_nobody_waits_for_it(file: Path, writer: LogWriter) -> None:
    async def main() -> None:
        producer = make(writer, both(file), Letters(fault=2))
        producer.start(REQUEST, range(4))
        with pytest.raises(EngineError, match="the engine is gone"):
            await producer.next()
        await producer.close()
        assert producer.running == 0

    asyncio.run(main())


def test_a_resumed_run_compares_what_was_not_compared(file: Path, writer: LogWriter, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def interrupted() -> None:
        runner, spelled = Letters(), Spelled()
        runner.hold[3] = asyncio.Event()
        producer = make(writer, both(file), runner, spelled=spelled)
        producer.start(REQUEST, range(4))
        await spelled.three.wait()
        await producer.close()

    async def resumed(samples: list[int], ran: list[str]) -> dict[str, Scored]:
        runner = Letters()
        producer = make(writer, both(file), runner, logged_episodes(log, 0))
        producer.start(REQUEST, samples)
        got = await take(producer, len(samples))
        assert runner.ran == ran
        return got

    asyncio.run(interrupted())
    first = asyncio.run(resumed([0, 1, 2, 3], ["g000003.3"]))
    once = rewarded(log)
    assert {id: r.reward for id, r in once.items()} == {id: s.reward for id, s in first.items()}
    again = asyncio.run(resumed([2, 3], []))  # the checkpoint's buffer holds 0 and 1
    assert {id: s.reward for id, s in again.items()} == {id: first[id].reward for id in again}
    assert rewarded(log) == once, "nothing was compared again"
    late = asyncio.run(resumed_without(writer, file, log))
    assert late.episode.outcome is Outcome.INFRA_FAILURE
    assert "compared without it" in late.episode.reason


async def resumed_without(writer: LogWriter, file: Path, log: Path) -> Scored:
    """Sample 3 had no reward when its group was compared; the buffer of the checkpoint holds the others."""
    found = logged_episodes(log, 0)
    unrewarded = type(found["g000003.3"])(found["g000003.3"].episode, None)
    producer = make(writer, both(file), Letters(), {"g000003.3": unrewarded})
    producer.start(REQUEST, [3])
    return await producer.next()


def test_a_run_trains_on_a_comparison(file: Path, tmp_path: Path) -> None:
    def changed(**evaluation: Any) -> Callable[[], Any]:
        rewards = [{"type": "python_group", "path": f"{file}:ranks"}, {"type": "random", "weight": 0.1}]
        return lambda: tiny(tmp_path, rewards=rewards, steps=2, evaluation={"every": 0, "greedy": False, **evaluation})

    with pytest.raises(
        ValidationError, match=r"'python_group' compares the members of a group.*set evaluation\.rewards"
    ):
        changed()()
    config = changed(rewards=[{"type": "exact"}])()
    api.train(config)
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["reward/component/python_group"] for row in rows] == [0.5, 0.5], "the mean of 0, 1/3, 2/3 and 1"
