"""The tool loop in a run: what is recorded, how an episode ends, and that kill -9 loses nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.integration.runner_rig import config, episodes
from tests.integration.test_kill_resume import finish, kill_when, records, trained_tokens

from sluice.errors import ConfigError, DataError
from sluice.log import ACCOUNTED, LogReader, account
from sluice.orchestrate import api
from sluice.types import Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOOLS = '''
import asyncio


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def broken():
    async def add(a: int, b: int) -> int:
        """Add two numbers."""
        await asyncio.Event().wait()
        return 0
    return add


slow = broken()
'''


@pytest.fixture
def tools(tmp_path: Path) -> str:
    file = tmp_path / "tools.py"
    file.write_text(TOOLS)
    return str(file)


def test_a_tool_conversation_is_one_segment(tmp_path: Path, tool_model: Path, tools: str) -> None:
    run = config(tmp_path, tool_model, {"type": "tools", "tools": [f"{tools}:add"]}, rewards=[{"type": "exact"}])
    summary = api.train(run)
    assert summary.logprob_mismatch_mean_abs < 1e-4
    found = episodes(run)
    assert len(found) == 8
    for episode in found.values():
        assert episode.outcome is Outcome.COMPLETED
        (segment,) = episode.segments
        assert [turn.author.value for turn in segment.turns] == ["observed", "sampled"] * 2


@pytest.mark.parametrize(
    ("tool", "changes", "outcome", "reason"),
    [
        ("add", {"max_turns": 1}, Outcome.TRUNCATED, "1 answers, and the last one calls a tool"),
        ("slow", {"tool_seconds": 0.1}, None, ""),
        ("slow", {"episode_seconds": 5.0}, Outcome.INFRA_FAILURE, "the episode took longer than 5 s"),
    ],
    ids=["max-turns", "a-tool-hangs", "the-episode-hangs"],
)
def test_how_an_episode_ends(
    tmp_path: Path,
    tool_model: Path,
    tools: str,
    tool: str,
    changes: dict[str, Any],
    outcome: Outcome | None,
    reason: str,
) -> None:
    runner = {"type": "tools", "tools": [f"{tools}:{tool}"], **changes}
    run = config(tmp_path, tool_model, runner, steps=1, limits={"max_infra_failures": 1.0})
    api.train(run)
    for episode in episodes(run).values():
        assert len(list(episode.sampled_turns())) >= 1
        if outcome is not None:
            assert (episode.outcome, episode.reason) == (outcome, reason)
        else:
            assert episode.outcome.counts, "a tool that hangs is told to the model; it is no failure of ours"


def test_killed_and_resumed(tmp_path: Path, tool_model: Path, tools: str) -> None:
    runner = {"type": "tools", "tools": [f"{tools}:add"]}
    changes: dict[str, Any] = {"steps": 4, "checkpoint": {"every": 1, "keep": 2}}
    straight = config(tmp_path / "straight", tool_model, runner, **changes)
    finish(straight)
    broken = config(tmp_path / "broken", tool_model, runner, **changes)
    total = records(straight.folder / "log")
    hits = [kill_when(broken, total * share // 10, resume=share > 3) for share in (3, 6)]
    assert any(hits), "no kill met a living run"
    finish(broken, resume=True)
    fate = account(LogReader(broken.folder / "log").read(kinds=ACCOUNTED))
    assert fate.complete, "an episode was lost or logged twice"
    assert not fate.decided_twice
    assert trained_tokens(broken) == trained_tokens(straight)


def test_bad_input(tmp_path: Path, tool_model: Path, tools: str) -> None:
    with pytest.raises(ConfigError, match="has no 'ad'"):
        api.train(config(tmp_path, tool_model, {"type": "tools", "tools": [f"{tools}:ad"]}))
    runner = {"type": "tools", "tools": [f"{tools}:add"]}
    with pytest.raises(ValidationError, match="would see none"):
        config(tmp_path, tool_model, runner, rollout={"chat": {"format": "none"}})
    with pytest.raises(DataError, match="tokens with its tools; the context holds 8"):
        api.train(config(tmp_path, tool_model, runner, rollout={"context_length": 8}), overwrite=True)
