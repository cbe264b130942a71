"""`sluice serve`: a client talks to it by what it prints, a signal ends it cleanly, the log holds what was sampled."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sluice import cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEADLINE = 150.0


def server(model: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-c", "from sluice.cli import main; main()", "serve", str(model)]
    return subprocess.Popen(
        [*command, "--folder", str(folder), "rollout.embedded.kv_tokens=8192", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], pattern: str) -> tuple[str, ...]:
    """The groups of the first printed line that matches."""
    assert process.stdout is not None
    for line in process.stdout:  # ends when the process does
        if found := re.search(pattern, line):
            return found.groups()
    assert process.stderr is not None
    raise AssertionError(f"it ended without {pattern!r}: {process.stderr.read()}")


@pytest.fixture
def started(tool_model: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = server(tool_model, tmp_path / "served", "--format", "qwen", "--open-session")
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=30)


def test_a_client_talks_and_the_log_has_it(started: subprocess.Popen[str], tmp_path: Path) -> None:
    until(started, "chat format qwen")
    (url,) = until(started, r"serving actor at (\S+)")
    (owner,) = until(started, r"owner's key, shown only here: export SLUICE_OWNER_KEY=(\S+)")
    base, key = until(started, r"OPENAI_BASE_URL=(\S+) OPENAI_API_KEY=(\S+)")
    assert base == f"{url}/v1"
    with httpx.Client(timeout=60) as http:
        mine, owners = {"Authorization": f"Bearer {key}"}, {"Authorization": f"Bearer {owner}"}
        body = {"model": "actor", "messages": [{"role": "user", "content": "say 5"}], "max_tokens": 8}
        assert http.post(f"{base}/chat/completions", json=body, headers=mine).status_code == 200
        opened = http.post(f"{url}/sessions", json={"task": "sums", "group": "one"}, headers=owners).json()
        assert opened["episode_id"] == "serve-000002"
        theirs = {"Authorization": f"Bearer {opened['session_key']}"}
        assert http.post(f"{base}/chat/completions", json=body, headers=theirs).status_code == 200
        done = http.post(f"{url}/sessions/serve-000002/finish", json={"rewards": {"good": 1}}, headers=owners)
        assert done.status_code == 200, done.text
    started.send_signal(signal.SIGTERM)
    _, error = started.communicate(timeout=DEADLINE)
    assert started.returncode == 0, error
    lines = subprocess.run(
        [sys.executable, "-c", "from sluice.cli import main; main()", "episodes", str(tmp_path / "served")],
        capture_output=True, text=True, timeout=DEADLINE, check=True,
    ).stdout  # fmt: skip
    assert key not in lines
    assert owner not in lines
    rows = [json.loads(line) for line in lines.splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds == ["run", "episode", "reward", "episode"]
    ended = {row["episode"]["id"]: row["episode"] for row in rows if row["kind"] == "episode"}
    assert ended["serve-000001"]["outcome"] == "aborted"
    assert ended["serve-000002"]["prompt"]["task"] == "sums"


def test_ctrl_c_ends_it_while_it_serves(started: subprocess.Popen[str]) -> None:
    until(started, "serving actor")
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=DEADLINE)
    assert started.returncode == 0, error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-model"], "there is no model folder no-such-model"),
        (["m", "--engines", "2"], "--engines 2 starts SGLang servers"),
        (["m", "rollout.sampling.temprature=1"], "did you mean 'temperature'?"),
        (["m", "steps=3"], "keys begin with 'rollout.' here"),
        (["m", "--format", "qwem"], "--format qwem"),
        (["m", "rollout.runner.type=tools", 'rollout.runner.tools=["a.py:b"]'], "clients open sessions themselves"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert cli.run(["serve", *words]) == 2
    assert message in capsys.readouterr().err
