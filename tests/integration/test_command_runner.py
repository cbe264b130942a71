"""Agent programs: started, served by the real gateway, verified, trained on; and every way in which they go wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.integration.runner_rig import ROOT, config, episodes, rewards

from sluice.errors import ConfigError, EngineError
from sluice.orchestrate import api
from sluice.types import Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AGENT = ROOT / "examples" / "calculator_agent.py"
VERIFY = ROOT / "examples" / "verify_sum.py"
GIVEN = [{"type": "given", "name": "correct", "component": "correct"}, {"type": "given", "component": "tidy"}]
CALL = """
import json, os, urllib.request
body = {"model": "actor", "messages": [{"role": "user", "content": "say 5"}]}
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
    {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
)
urllib.request.urlopen(request, timeout=60).read()
"""


def command(*words: object, **changes: Any) -> dict[str, Any]:
    return {"type": "command", "command": [sys.executable, *map(str, words)], "seconds": 90.0, "parallel": 2, **changes}


def test_an_openai_agent_is_trained(tmp_path: Path, tool_model: Path) -> None:
    runner = command(AGENT, verify=[sys.executable, str(VERIFY)])
    run = config(tmp_path, tool_model, runner, rewards=[*GIVEN, {"type": "random"}])
    summary = api.train(run)
    assert summary.steps == 2
    assert summary.logprob_mismatch_mean_abs < 1e-4
    found = episodes(run)
    assert len(found) == 8
    for episode in found.values():
        assert episode.outcome is Outcome.COMPLETED
        (segment,) = episode.segments
        assert [turn.author.value for turn in segment.turns] == ["observed", "sampled"] * 2
        assert set(episode.info["rewards"]) == {"correct", "tidy"}
        home = run.folder / "agents" / episode.id
        assert sorted(file.name for file in home.iterdir()) == ["log.txt", "prompt.json"]
        assert "sk-sluice" not in (home / "log.txt").read_text()
        assert set(json.loads((home / "prompt.json").read_text())) == {"id", "task", "messages", "metadata"}
    given = rewards(run)
    assert sum(reward.components["correct"] for reward in given.values()) >= 6, "the tool model adds rightly"


@pytest.mark.parametrize(
    ("code", "changes", "outcome", "reason"),
    [
        ("pass", {}, Outcome.ABORTED, "no model call"),
        ("import sys; sys.exit('boom')", {}, Outcome.INFRA_FAILURE, "the agent ended with exit code 1: boom"),
        (CALL + "raise ValueError('late')", {}, Outcome.INFRA_FAILURE, "exit code 1: ValueError: late"),
        ("import os; os.kill(os.getpid(), 9)", {}, Outcome.INFRA_FAILURE, "the agent was killed by SIGKILL"),
        ("import time; time.sleep(99)", {"seconds": 2.0}, Outcome.INFRA_FAILURE, "did not end within 2 s"),
    ],
    ids=["says-nothing", "exits-1", "dies-after-a-call", "killed", "hangs"],
)
def test_what_becomes_of_an_agent(
    tmp_path: Path, tool_model: Path, code: str, changes: dict[str, Any], outcome: Outcome, reason: str
) -> None:
    """Of every group one agent works and the other does not; none of those is ever rewarded."""
    file = tmp_path / "agent.py"
    second = "os.environ['SLUICE_EPISODE_ID'].endswith('.1')"
    file.write_text(f"import os\nexec({code!r} if {second} else {CALL!r})\n")
    run = config(tmp_path, tool_model, command(file, **changes), steps=1, limits={"max_infra_failures": 0.6})
    api.train(run)
    found, given = episodes(run), rewards(run)
    for id, episode in found.items():
        if id.endswith(".1"):
            assert (episode.outcome, id in given) == (outcome, False)
            assert reason in episode.reason
        else:
            assert (episode.outcome, id in given) == (Outcome.COMPLETED, True)


def test_when_all_agents_fail_the_run_says_why(tmp_path: Path, tool_model: Path) -> None:
    run = config(tmp_path, tool_model, command("-c", "import nonesuch"), steps=1)
    with pytest.raises(EngineError, match=r"4 of 4 episodes .*No module named 'nonesuch'"):
        api.train(run)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys; sys.exit(3)", "verify ended with exit code 3"),
        ("print('good')", "neither a number nor a JSON object"),
        ("print('NaN')", "no finite number"),
        ("print('{\"reward\": null}')", "no finite number"),
    ],
)
def test_a_verifier_that_fails_rewards_nothing(tmp_path: Path, tool_model: Path, code: str, why: str) -> None:
    file = tmp_path / "agent.py"
    file.write_text(CALL)
    runner = command(file, verify=[sys.executable, "-c", code])
    run = config(tmp_path, tool_model, runner, steps=1, rewards=[{"type": "given"}])
    with pytest.raises(Exception, match=why):
        api.train(run)
    assert not rewards(run)


def test_the_environment_of_an_agent(tmp_path: Path, tool_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_OWNER_KEY", "owner-secret")
    monkeypatch.setenv("SOME_SERVICE_API_KEY", "service-secret")
    template = tmp_path / "template"
    template.mkdir()
    (template / "notes.txt").write_text("begin")
    file = tmp_path / "agent.py"
    seen = "{'env': dict(os.environ), 'here': os.listdir(), 'prompt': json.load(open(os.environ['SLUICE_PROMPT']))}"
    file.write_text(f"{CALL}\njson.dump({seen}, open('seen.json', 'w'))\nprint(os.environ['OPENAI_API_KEY'])\n")
    runner = command(file, template=str(template), keep=True, env={"EXTRA": "1"})
    run = config(tmp_path, tool_model, runner, steps=1)
    api.train(run)
    home = run.folder / "agents" / "g000000.0"
    seen_by_agent = json.loads((home / "work" / "seen.json").read_text())
    env = seen_by_agent["env"]
    assert seen_by_agent["here"] == ["notes.txt"]
    assert seen_by_agent["prompt"]["messages"][0]["content"].startswith("add")
    assert "answer" not in seen_by_agent["prompt"]
    assert env["EXTRA"] == "1"
    assert env["SLUICE_EPISODE_ID"] == "g000000.0"
    assert env["OPENAI_API_KEY"] == env["ANTHROPIC_API_KEY"]
    assert env["OPENAI_BASE_URL"] == f"{env['ANTHROPIC_BASE_URL']}/v1"
    assert "owner-secret" not in env.values()
    assert "service-secret" not in env.values()
    assert env["OPENAI_API_KEY"] not in (home / "log.txt").read_text()


def test_bad_input(tmp_path: Path, tool_model: Path) -> None:
    with pytest.raises(ConfigError, match="there is no program 'no-such-agent'"):
        api.train(config(tmp_path, tool_model, {"type": "command", "command": ["no-such-agent"]}))
    with pytest.raises(ConfigError, match="there is no folder"):
        api.train(config(tmp_path, tool_model, command("-c", "", template=str(tmp_path / "none"))), overwrite=True)
