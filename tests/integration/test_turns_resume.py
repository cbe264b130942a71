"""Stopped in the middle of conversations and resumed: they go on from their finished turns, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_kill_resume import DEADLINE, PROCESSES, comparable, trained_tokens
from tests.tiny import tiny

from sluice.config import RunConfig
from sluice.log import ACCOUNTED, EpisodeRecord, Kind, LogReader, TurnRecord, VersionRecord, account
from sluice.obs.metrics import read_metrics
from sluice.types import Episode, Turn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TURNS = 4
CHAIN = '''
import asyncio
from pathlib import Path

from sluice.rollout.chat.base import ChatMessage
from sluice.rollout.runners.toolkit import chat_messages
from sluice.rollout.session import Ask


class Chain:
    """Asks four times; before the last time some groups wait for a file, as for a slow tool."""

    def __init__(self, kit, hold, file):
        self.kit, self.hold, self.file = kit, hold, Path(file)

    def admit(self, prompt, max_new_tokens):
        self.kit.admit(prompt, max_new_tokens)

    async def run(self, request):
        session = self.kit.session(request)
        messages = list(chat_messages(request.prompt))
        for turn in range(4):
            while turn == 3 and request.group_id in self.hold and not self.file.exists():
                self.file.with_name(request.id).touch()
                await asyncio.sleep(0.05)
            (choice,) = await session.ask(Ask(tuple(messages)))
            messages += [ChatMessage("assistant", choice.parsed.content), ChatMessage("user", f"{turn}+1=")]
        return session.finish()
'''
AGENT = """
import json, os, sys, time, urllib.request

hold, file = sys.argv[1].split(","), sys.argv[2]
id = os.environ["SLUICE_EPISODE_ID"]
messages = json.load(open(os.environ["SLUICE_PROMPT"]))["messages"]
for turn in range(4):
    while turn == 3 and id.partition(".")[0] in hold and not os.path.exists(file):
        open(os.path.join(os.path.dirname(file), id), "w").close()
        time.sleep(0.05)
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": "actor", "messages": messages}).encode(),
        {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"},
    )
    answer = json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["message"]
    messages += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": f"{turn}+1="}]
"""


def train(config: dict[str, Any], resume: bool, asked: str) -> None:
    """What the child process runs: a run whose engine writes down what it is asked."""
    from sluice.orchestrate import api
    from sluice.rollout.engines.base import GenerateRequest, Generation
    from sluice.rollout.engines.embedded import EmbeddedEngine

    generate = EmbeddedEngine.generate

    async def counting(self: EmbeddedEngine, request: GenerateRequest) -> Generation:
        file.write(request.rid + "\n")
        return await generate(self, request)

    EmbeddedEngine.generate = counting
    with Path(asked).open("a", buffering=1) as file:
        api.train(RunConfig.model_validate(config), resume=resume)


def begin(config: RunConfig, asked: Path, *, resume: bool = False) -> Any:
    process = PROCESSES.Process(target=train, args=(json.loads(config.model_dump_json()), resume, str(asked)))
    process.start()
    return process


def finish(config: RunConfig, asked: Path, *, resume: bool = False) -> None:
    process = begin(config, asked, resume=resume)
    process.join(DEADLINE)
    assert process.exitcode == 0, f"the run ended with {process.exitcode}"


def stop_when(config: RunConfig, asked: Path, there: Callable[[], bool], number: int) -> None:
    """Run until something is there, then send the signal."""
    process = begin(config, asked)
    until = time.monotonic() + DEADLINE
    while not there():
        assert process.is_alive(), f"the run ended with {process.exitcode}"
        assert time.monotonic() < until, "the run did not come so far"
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(DEADLINE)
    assert process.exitcode not in (None, 0)


def kept(config: RunConfig) -> list[TurnRecord]:
    """What the log of turns holds of unfinished episodes."""
    found = [entry.record for entry in LogReader(config.folder / "turns").read(kinds=(Kind.TURN,))]
    over = episodes(config).keys()
    return [record for record in found if isinstance(record, TurnRecord) and record.episode_id not in over]


def wait(folder: Path, groups: list[str]) -> bool:
    """Whether all episodes of these groups wait for their last turn."""
    return all((folder / f"{group}.{sample}").exists() for group in groups for sample in range(4))


def per_group(records: list[TurnRecord]) -> Counter[str]:
    return Counter(record.episode_id.partition(".")[0] for record in records)


def episodes(config: RunConfig) -> dict[str, Episode]:
    found = [entry.record for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,))]
    return {record.episode.id: record.episode for record in found if isinstance(record, EpisodeRecord)}


def same(one: Turn, other: Turn) -> bool:
    assert one.logprobs is not None
    assert other.logprobs is not None
    same_bits = one.ids.tobytes() == other.ids.tobytes() and one.logprobs.tobytes() == other.logprobs.tobytes()
    return same_bits and (one.spans, one.finish, one.sampling) == (other.spans, other.finish, other.sampling)


def chain(folder: Path, hold: list[str], kind: str = "python", **changes: Any) -> RunConfig:
    """A run of conversations; `hold` wait for `folder/go` before their last turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chain.py").write_text(CHAIN)
    (folder / "agent.py").write_text(AGENT)
    go = str(folder / "go")
    runner: dict[str, Any] = {
        "type": "python",
        "path": f"{folder}/chain.py:Chain",
        "params": {"hold": hold, "file": go},
    }
    if kind == "command":
        command = [sys.executable, "-S", f"{folder}/agent.py", ",".join(hold), go]
        runner = {"type": "command", "command": command, "parallel": 16}
    rollout = {"runner": runner, "sampling": {"max_new_tokens": 4}}
    quiet = {"evaluation": {"every": 0, "greedy": False}, "limits": {"stall_seconds": DEADLINE}}
    data = {"eval_prompts": 0, **changes.pop("data", {})}
    return tiny(folder, **{"rollout": rollout, "data": data, **quiet, **changes})


@pytest.mark.parametrize(
    ("kind", "number", "turns"),
    [("python", signal.SIGKILL, 2), ("python", signal.SIGINT, 3), ("command", signal.SIGKILL, 2)],
    ids=["killed", "interrupted", "agents-killed"],
)
def test_at_lag_0_it_is_the_run_that_was_never_stopped(
    tmp_path: Path, kind: str, number: signal.Signals, turns: int
) -> None:
    """All conversations of the second batch are under way; the checkpoint is that of step 0."""
    hold = [f"g00000{ordinal}" for ordinal in range(4, 8)]
    straight = chain(tmp_path / "straight", hold, kind, steps=3)
    (tmp_path / "straight" / "go").touch()
    finish(straight, tmp_path / "straight" / "asked")

    broken = chain(tmp_path / "broken", hold, kind, steps=3)
    stop_when(broken, tmp_path / "first", lambda: wait(tmp_path / "broken", hold), number)
    records = kept(broken)
    assert per_group(records) == dict.fromkeys(hold, 4 * turns)
    (tmp_path / "broken" / "go").touch()
    finish(broken, tmp_path / "second", resume=True)

    asked = (tmp_path / "second").read_text().split()
    missing = {f"{group}.{sample}/{turn}" for group in hold for sample in range(4) for turn in range(turns, TURNS)}
    third = {f"g{ordinal:06d}.{sample}/{turn}" for ordinal in range(8, 12) for sample in range(4) for turn in range(4)}
    assert sorted(asked) == sorted(missing | third), "the engine is asked for what is missing, and for nothing else"
    found = episodes(broken)
    for at, record in enumerate(records):
        mine = [each for each in records[:at] if each.episode_id == record.episode_id]
        assert same(list(found[record.episode_id].sampled_turns())[len(mine)], record.turn)
    assert trained_tokens(broken) == trained_tokens(straight)
    fate = account(LogReader(broken.folder / "log").read(kinds=ACCOUNTED))
    assert fate.complete, "an episode was lost or logged twice"
    rows = read_metrics(broken.folder / "metrics.jsonl")
    assert [row["session/reused_turns"] for row in rows] == [0, 16 * turns, 0]
    assert rows[1]["session/reused_tokens"] == sum(len(record.turn) for record in records)
    for mine, theirs in zip(comparable(broken), comparable(straight), strict=True):
        for name in ("session/reused_turns", "session/reused_tokens"):
            del mine[name], theirs[name]
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_with_a_lag_what_is_too_old_is_drawn_again(tmp_path: Path) -> None:
    """At lag 2 twelve groups are under way. One waits since version 0, one since version 3, and so do those that come
    after version 4, when the run stands still and is killed. It goes on from the checkpoint of step 4."""
    late = [f"g0000{ordinal}" for ordinal in range(24, 28)]
    hold = ["g000000", "g000022", *late]
    config = chain(tmp_path, hold, steps=8, data={"gate": {"max_lag": 2}})

    def stands() -> bool:
        return wait(tmp_path, hold) and (config.folder / "checkpoints" / "step-000004").exists()

    stop_when(config, tmp_path / "first", stands, signal.SIGKILL)
    log = [entry.record for entry in LogReader(config.folder / "log").read(kinds=(Kind.VERSION,))]
    assert max(record.version.step for record in log if isinstance(record, VersionRecord)) <= 5
    records = kept(config)
    assert set(per_group(records)) >= set(hold)
    (tmp_path / "go").touch()
    finish(config, tmp_path / "second", resume=True)

    asked = Counter((tmp_path / "second").read_text().split())
    found = episodes(config)
    seen: Counter[str] = Counter()
    old = reused = 0
    for record in records:
        id, turn = record.episode_id, seen[record.episode_id]
        seen[id] += 1
        name = f"{id}/{turn}"
        if min(span.version.step for span in record.turn.spans) < 4 - 2:
            assert asked[name] == 1
            assert all(span.version.step >= 4 for span in list(found[id].sampled_turns())[turn].spans)
            old += 1
        else:
            assert asked[name] == 0, (name, record.turn.spans)
            assert same(list(found[id].sampled_turns())[turn], record.turn)
            reused += 1
    assert old >= 4 * 2, "of the group of version 0 nothing is young enough"
    assert reused >= 4 * 2 * 5, "of the others everything is"
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert sum(row["session/reused_turns"] for row in rows) == reused
    assert max(row["gate/lag_max"] for row in rows[5:]) >= 1
    fate = account(LogReader(config.folder / "log").read(kinds=ACCOUNTED))
    assert fate.complete
    assert all(len(fate.trained_at(step)) == 16 for step in range(1, 9))
