"""A runner of the user's own: a class in a file, given a toolkit, trained like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import tiny

from sluice.errors import ConfigError
from sluice.log import ACCOUNTED, EpisodeRecord, Kind, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api

TWICE = '''
from sluice.rollout.chat.base import ChatMessage
from sluice.rollout.runners.toolkit import chat_messages
from sluice.rollout.session import Ask


class Twice:
    """Asks the question, and once more after the answer."""

    def __init__(self, kit, again):
        self.kit, self.again = kit, again

    def admit(self, prompt, max_new_tokens):
        self.kit.admit(prompt, max_new_tokens)

    async def run(self, request):
        session = self.kit.session(request)
        messages = list(chat_messages(request.prompt))
        (first,) = await session.ask(Ask(tuple(messages)))
        messages += [ChatMessage("assistant", first.parsed.content), ChatMessage("user", self.again)]
        await session.ask(Ask(tuple(messages)))
        return session.finish()
'''


def test_a_class_of_ones_own_is_trained(tmp_path: Path) -> None:
    file = tmp_path / "twice.py"
    file.write_text(TWICE)
    runner = {"type": "python", "path": f"{file}:Twice", "params": {"again": "2+2="}}
    config = tiny(tmp_path, steps=2, rollout={"runner": runner}, evaluation={"every": 0, "greedy": False})
    api.train(config, view=NullView())
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert max(row["mismatch/mean_abs"] for row in rows) < 1e-5
    assert all(row["session/mismatches"] == 0 for row in rows)
    for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,)):
        assert isinstance(entry.record, EpisodeRecord)
        episode = entry.record.episode
        assert len(episode.segments) == 1
        assert len(list(episode.sampled_turns())) == 2


FLAKY = (
    TWICE
    + """

class Flaky(Twice):
    "Of each episode the first attempt fails; of every fourth sample all do."

    tried = set()

    async def run(self, request):
        if request.id.endswith(".3") or (request.id not in self.tried and not request.measured):
            self.tried.add(request.id)
            session = self.kit.session(request)
            return session.finish(Outcome.INFRA_FAILURE, "the sandbox is gone")
        return await super().run(request)
""".replace("self.tried", "Flaky.tried")
)


def test_an_episode_that_fails_is_run_again_as_often_as_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "flaky.py"
    file.write_text("from sluice.types import Outcome\n" + FLAKY)
    runner = {"type": "python", "path": f"{file}:Flaky", "params": {"again": "2+2="}}
    config = tiny(tmp_path, steps=2, rollout={"runner": runner, "retries": 2}, evaluation={"every": 0, "greedy": False})
    api.train(config, view=NullView())
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["rollout/infra_failure"] for row in rows] == [4, 4]
    episodes = [entry.record.episode for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,))
                if isinstance(entry.record, EpisodeRecord) and entry.record.episode.id.startswith("g0")]  # fmt: skip
    assert {episode.info["failures"] for episode in episodes} == {1, 2}
    assert all((episode.info["failures"] == 2) == episode.id.endswith(".3") for episode in episodes)
    faults = [entry.record for entry in LogReader(config.folder / "log").read(kinds=(Kind.FAULT,))]
    assert sum(episode.info["failures"] for episode in episodes) == len(faults) == 2 * 4 * (3 + 2)
    assert account(LogReader(config.folder / "log").read(kinds=ACCOUNTED)).complete


def test_a_class_that_is_no_runner_is_named_before_the_run(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("class Wrong:\n    def __init__(self, kit):\n        pass\n")
    config = tiny(tmp_path, rollout={"runner": {"type": "python", "path": f"{file}:Wrong"}})
    with pytest.raises(ConfigError, match="has no 'admit'; Runner needs it"):
        api.train(config, view=NullView())
