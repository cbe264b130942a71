"""Evaluations on servers of their own: weights change meanwhile, answers do not, and rows stay in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_evaluation_beside import answers, logged, rows, summary
from tests.tiny import tiny

from sluice.config import RunConfig
from sluice.log import EpisodeRecord
from sluice.log.records import DispositionRecord, EvalRecord, VersionRecord
from sluice.obs.view import NullView
from sluice.orchestrate import api

pytestmark = pytest.mark.timeout(300)

PATIENT = '''
import asyncio

from sluice.rollout.runners.toolkit import chat_messages
from sluice.rollout.session import Ask

trained = asyncio.Event()  # by the weights of step 3


class Patient:
    """Answers the held-out prompts of step 2 when the run samples with the weights of step 3, if it is told to wait."""

    def __init__(self, kit, waits):
        self.kit, self.waits = kit, waits

    def admit(self, prompt, max_new_tokens):
        self.kit.admit(prompt, max_new_tokens)

    async def run(self, request):
        if self.waits and request.id.startswith("greedy-000002"):
            await trained.wait()
        session = self.kit.session(request)
        await session.ask(Ask(tuple(chat_messages(request.prompt))))
        episode = session.finish()
        if not request.measured and any(s.version.step == 3 for t in episode.sampled_turns() for s in t.spans):
            trained.set()
        return episode
'''


def patient(folder: Path, *, servers: int, every: int, checkpoints: int, **changes: Any) -> RunConfig:
    folder.mkdir()
    file = folder / "patient.py"
    file.write_text(PATIENT)
    runner = {"type": "python", "path": f"{file}:Patient", "params": {"waits": servers > 0}}
    return tiny(
        folder, steps=4, evaluation={"every": every, "servers": servers}, limits={"stall_seconds": 100.0},
        checkpoint={"every": checkpoints, "keep": 9}, rollout={"embedded": {"servers": 1}, "runner": runner}, **changes,
    )  # fmt: skip


@pytest.mark.slow
def test_the_next_weights_do_not_wait_and_answers_are_of_those_that_were_measured(tmp_path: Path) -> None:
    """The evaluation of step 2 cannot end before the run has sampled with the weights of step 3."""
    config = patient(tmp_path / "own", servers=1, every=2, checkpoints=2)
    api.train(config, view=NullView())
    records = logged(config)
    measured = {r.step: r for r in records if isinstance(r, EvalRecord)}
    assert sorted(measured) == [0, 2, 4]
    for step, record in measured.items():
        episodes = [r.episode for r in (records[at] for at in answers(records, step)) if isinstance(r, EpisodeRecord)]
        assert len(episodes) == 16
        spans = {span.version for episode in episodes for turn in episode.sampled_turns() for span in turn.spans}
        assert spans == {record.version}
        assert record.version.step == step
    before = records[: answers(records, 2)[-1]]
    assert any(isinstance(r, VersionRecord) and r.version.step == 3 for r in before)
    assert any(isinstance(r, DispositionRecord) and r.step == 3 for r in before), "an update, whole"

    shared = patient(tmp_path / "shared", servers=0, every=2, checkpoints=2)
    api.train(shared, view=NullView())
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4]
    assert [figures(row) for row in rows(config)] == [figures(row) for row in rows(shared)]
    assert summary(config) == summary(shared)
    assert (config.folder / "evaluation" / "engines" / "embedded-0.log").is_file()


def figures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("engine/")}


@pytest.mark.slow
def test_a_checkpoint_keeps_only_what_can_be_measured_again(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 9}, "rollout": {"embedded": {"servers": 1}}}
    config = tiny(tmp_path, steps=4, evaluation={"every": 2, "servers": 1, "samples": 8}, **changes)
    api.train(config, view=NullView())
    states = {
        folder.name: json.loads((folder / "run.json").read_text())["progress"]
        for folder in (config.folder / "checkpoints").glob("step-*")
    }
    assert len(states) == 5
    assert {state["batch"] for state in states.values() if state["held"] is not None} <= {0, 2}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "it starts none: set rollout.embedded.servers"),
        ({"rollout": {"engine": "http://127.0.0.1:1"}}, "it starts none"),
        ({"rollout": {"engine": "sglang", "sglang": {"groups": [{"devices": ["0"]}]}}}, "leave one group"),
        (
            {"rollout": {"embedded": {"servers": 1}}, "data": {"eval_prompts": 0}, "evaluation": {"every": 0}},
            "held-out",
        ),
    ],
)
def test_what_is_not_there_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    evaluation = {**changes.pop("evaluation", {}), "servers": 1}
    with pytest.raises(ValueError, match=says):
        tiny(tmp_path, evaluation=evaluation, **changes)
