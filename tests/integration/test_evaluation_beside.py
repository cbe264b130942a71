"""Evaluations beside the loop: every answer is of the version that was measured, and the loop went on meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny

from sluice.config import RunConfig
from sluice.errors import EngineError
from sluice.log import EpisodeRecord, LogReader
from sluice.log.records import EvalRecord, FaultRecord, Record, VersionRecord
from sluice.log.writer import LogWriter
from sluice.models.build import load_tokenizer
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api
from sluice.orchestrate.inline import make_evaluator
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.serving import open_rollout
from sluice.orchestrate.setup import embedded_engine, initial_model, load_data
from sluice.orchestrate.stall import Stall
from sluice.types import Version

TIMED = ("time/", "speed/", "checkpoint/", "eval/seconds")
EVERY = {"every": 1}


class Stops(NullView):
    """Fails in the moment in which the evaluation of a batch ended and nothing was written of it."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self._batch:
            raise OSError("the terminal is gone")


def logged(config: RunConfig) -> list[Record]:
    return [entry.record for entry in LogReader(config.folder / "log").read()]


def answers(records: Sequence[Record], step: int) -> list[int]:
    """Where the answers of an evaluation stand in the log, its greedy ones too."""
    named = (f"eval-{step:06d}.", f"greedy-{step:06d}.")
    return [at for at, r in enumerate(records) if isinstance(r, EpisodeRecord) and r.episode.id.startswith(named)]


def rows(config: RunConfig) -> list[dict[str, Any]]:
    found = read_metrics(config.folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in found]


def summary(config: RunConfig) -> dict[str, Any]:
    found = json.loads((config.folder / "summary.json").read_text())
    return {name: found[name] for name in ("eval_before", "eval_after", "greedy_before", "greedy_after", "steps")}


@pytest.mark.parametrize(("lag", "colocate"), [(0, False), (2, False), (1, True)], ids=["lag-0", "lag-2", "by-turns"])
def test_every_answer_is_of_one_version_and_the_loop_went_on(tmp_path: Path, lag: int, colocate: bool) -> None:
    config = tiny(
        tmp_path, steps=4, evaluation=EVERY, data={"gate": {"max_lag": lag}}, placement={"colocate": colocate}
    )
    api.train(config, view=NullView())
    records = logged(config)
    measured = {r.step: r for r in records if isinstance(r, EvalRecord)}
    assert sorted(measured) == [0, 1, 2, 3, 4]
    for step, record in measured.items():
        assert record.version.step == step
        at = answers(records, step)
        assert len(at) == 16
        episodes = [r.episode for r in (records[each] for each in at) if isinstance(r, EpisodeRecord)]
        spans = {span.version for episode in episodes for turn in episode.sampled_turns() for span in turn.spans}
        assert spans == {record.version}
        if step < 4 - lag:  # there was still something to be sampled
            between = records[at[0] : at[-1]]
            assert any(isinstance(r, EpisodeRecord) and r.episode.id.startswith("g0") for r in between), step
    for row in read_metrics(config.folder / "metrics.jsonl"):
        assert row["eval/accuracy"] == measured[row["version/step"]].metrics["eval/accuracy"]
        assert row["eval/seconds"] > 0
    born = [r.version.step for r in records if isinstance(r, VersionRecord)]
    assert born == [0, 1, 2, 3, 4]


def test_metrics_and_summary_do_not_depend_on_it(tmp_path: Path) -> None:
    runs = [tiny(tmp_path / str(beside), steps=4, evaluation={**EVERY, "beside": beside}) for beside in (True, False)]
    for config in runs:
        api.train(config, view=NullView())
    assert rows(runs[0]) == rows(runs[1])
    assert summary(runs[0]) == summary(runs[1])
    waits = [[row.get("time/evaluate", 0.0) > 0 for row in read_metrics(c.folder / "metrics.jsonl")] for c in runs]
    assert waits == [[True] * 4, [True] * 4], "what the loop waited for is told, little as it may be"


@pytest.mark.parametrize("batch", [0, 2])
def test_a_checkpoint_beside_an_evaluation_is_resumed_by_measuring_again(tmp_path: Path, batch: int) -> None:
    changes: dict[str, Any] = {"steps": 4, "evaluation": EVERY, "checkpoint": {"every": 1}}
    straight, broken = (tiny(tmp_path / name, **changes) for name in ("straight", "broken"))
    api.train(straight, view=NullView())
    with pytest.raises(OSError, match="the terminal is gone"):
        api.train(broken, view=Stops(batch))
    state = json.loads((broken.folder / "checkpoints" / f"step-{batch:06d}" / "run.json").read_text())
    assert state["progress"]["held"] is not None, "it was written while the evaluation was under way"
    assert [row["step"] for row in rows(broken)] == list(range(1, batch))
    api.train(broken, resume=True, view=NullView())
    assert rows(broken) == rows(straight)
    assert summary(broken) == summary(straight)
    measured = [r.step for r in logged(broken) if isinstance(r, EvalRecord)]
    assert measured == sorted([0, 1, 2, 3, 4, batch])


FAILING = '''
from sluice.errors import EngineError
from sluice.rollout.chat.base import ChatMessage
from sluice.rollout.runners.toolkit import chat_messages
from sluice.rollout.session import Ask


class Failing:
    """Cannot answer a held-out prompt once the model was trained."""

    def __init__(self, kit):
        self.kit = kit

    def admit(self, prompt, max_new_tokens):
        self.kit.admit(prompt, max_new_tokens)

    async def run(self, request):
        if request.id.startswith("eval-000001.q2"):
            raise EngineError("the engine is on fire", hint="put it out")
        session = self.kit.session(request)
        await session.ask(Ask(tuple(chat_messages(request.prompt))))
        return session.finish()
'''


@pytest.mark.parametrize("lag", [0, 2])
def test_its_failure_is_the_runs_and_comes_before_the_next_weights(tmp_path: Path, lag: int) -> None:
    file = tmp_path / "failing.py"
    file.write_text(FAILING)
    config = tiny(
        tmp_path, steps=4, evaluation=EVERY, data={"gate": {"max_lag": lag}},
        rollout={"runner": {"type": "python", "path": f"{file}:Failing"}},
    )  # fmt: skip
    with pytest.raises(EngineError, match="the engine is on fire") as caught:
        api.train(config, view=NullView())
    assert "of batch 1, was evaluated" in "".join(caught.value.__notes__)
    records = logged(config)
    assert any(isinstance(r, FaultRecord) and "on fire" in r.what for r in records)
    assert {r.step for r in records if isinstance(r, EvalRecord)} == {0}
    sampled = {
        span.version.step
        for r in records
        if isinstance(r, EpisodeRecord)
        for turn in r.episode.sampled_turns()
        for span in turn.spans
    }
    assert max(sampled) == 1, "nothing was answered by later weights"


def test_an_answer_of_other_weights_is_no_measurement(tmp_path: Path) -> None:
    """The engine serves version 0, and 3 is to be measured."""
    config = tiny(tmp_path)
    model = initial_model(config, tmp_path / "init")
    tokenizer = load_tokenizer(model)
    engine = embedded_engine(config.rollout.embedded, model, tokenizer, device="cpu", version=Version(0))

    async def main() -> None:
        async with AsyncExitStack() as stack:
            journal = Journal(stack.enter_context(LogWriter(tmp_path / "log")))
            rollout = await open_rollout(
                stack, config.rollout, engine, tokenizer, folder=tmp_path, template_kwargs={}, tell=print
            )
            data = load_data(config.data, seed=config.seed)
            evaluator = make_evaluator(stack, config, rollout, journal, data, Stall(60))
            await evaluator(0, Version(0))
            with pytest.raises(EngineError, match=r"to be answered by version 3\.0; the engine answered with 0\.0"):
                await evaluator(3, Version(3))

    asyncio.run(main())
