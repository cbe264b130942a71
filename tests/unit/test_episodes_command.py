"""`sluice episodes`: the filters, the text, the pipe that closes early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sluice.cli import run
from sluice.config.model import ScratchConfig, TokenizerConfig
from sluice.log import (
    CheckpointRecord,
    Disposition,
    DispositionRecord,
    EpisodeRecord,
    GroupRecord,
    LogWriter,
    ResumeRecord,
    RewardRecord,
    RunRecord,
    TurnRecord,
    VersionRecord,
)
from sluice.types import (
    Author,
    Episode,
    GroupRequest,
    Message,
    Outcome,
    Prompt,
    Reward,
    SamplingParams,
    Segment,
    Turn,
    Version,
    VersionSpan,
    observed,
)

PROMPT = Prompt("p", "calc", (Message("user", "1 + 1"),), "2")
SAMPLING = SamplingParams()


def episode(request: GroupRequest, sample: int, outcome: Outcome = Outcome.COMPLETED) -> Episode:
    span = (VersionSpan(0, 2, Version(request.ordinal)),)
    answer = Turn(
        Author.SAMPLED, np.array([5, 6], np.int32), np.array([-0.5, -0.25], np.float32), span, SAMPLING, "stop"
    )
    segments = (Segment((observed([3, 4]), answer)),)
    reason = "engine lost" if outcome is Outcome.INFRA_FAILURE else ""
    return Episode(request.episode_id(sample), request.id, PROMPT, segments, outcome, reason=reason)


def trained(episode: Episode, step: int) -> DispositionRecord:
    return DispositionRecord(episode.id, episode.group_id, Disposition.TRAINED, step=step)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two groups; group 1 was trained at step 2, then again at step 2 after a resume from step 1."""
    monkeypatch.chdir(tmp_path)
    found = Path("runs") / "small"
    requests = [GroupRequest(ordinal, PROMPT, 2, SAMPLING) for ordinal in range(2)]
    first = [episode(requests[0], 0), episode(requests[0], 1, Outcome.INFRA_FAILURE)]
    second = [episode(requests[1], 0)]
    reward = Reward({"exact": 1.0}, {"exact": 2.0})
    with LogWriter(found / "log") as log:
        log.append(RunRecord("digest", 0, "0.1.0"))
        log.append_many([GroupRecord(request) for request in requests])
        log.append_many([EpisodeRecord(one) for one in (*first, *second)])
        log.append_many([RewardRecord(one.id, reward) for one in (first[0], second[0])])
        log.append(trained(first[0], 1))
        log.append(VersionRecord(Version(1), Version(0), "c1"))
        cursor = log.append(CheckpointRecord(1, Version(1)))
        log.append(trained(second[0], 2))
        log.append(ResumeRecord(1, cursor))
        log.append(trained(second[0], 2))
        log.append(VersionRecord(Version(2), Version(1), "c2"))
    return found


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert run(["episodes", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def kinds(found: list[dict[str, object]]) -> list[object]:
    return [line["kind"] for line in found]


def test_everything_in_order_by_path_or_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(capsys, str(folder))
    assert [line["seq"] for line in found] == list(range(1, 16))
    assert lines(capsys, "small") == found
    assert lines(capsys, "small", "--limit", "4") == found[:4]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--kind", "reward"], ["reward", "reward"]),
        (["--outcome", "infra_failure"], ["episode"]),
        (["--outcome", "truncated"], []),
        (["--group", "g000001"], ["group", "episode", "reward", "disposition", "disposition"]),
        (["--group", "0", "--kind", "episode"], ["episode", "episode"]),
        (["--group", "0", "--outcome", "completed"], ["episode"]),
        (["--step", "1"], ["episode", "reward", "disposition", "version", "checkpoint", "resume"]),
        (["--step", "2"], ["episode", "reward", "disposition", "disposition", "version"]),
        (["--step", "2", "--kind", "episode"], ["episode"]),
        (["--step", "9"], []),
    ],
)
def test_filters(folder: Path, arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert kinds(lines(capsys, str(folder), *arguments)) == expected


def test_turns_of_unfinished_episodes_are_found_beside_the_log(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines(capsys, str(folder), "--kind", "turn") == []
    turn = next(episode(GroupRequest(1, PROMPT, 2, SAMPLING), 1).sampled_turns())
    with LogWriter(folder / "turns") as log:
        log.append_many([TurnRecord(f"g00000{ordinal}.1", "00ff", turn) for ordinal in range(2)])
    found = lines(capsys, str(folder), "--kind", "turn", "--group", "1")
    assert [line["episode_id"] for line in found] == ["g000001.1"]
    assert lines(capsys, str(folder), "--kind", "turn", "--step", "1") == []
    assert "turn" not in kinds(lines(capsys, str(folder)))


def test_text_decodes_each_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sluice.models.build import make_scratch

    architecture = {
        "model_type": "qwen3", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    scratch = ScratchConfig(
        architecture=architecture, tokenizer=TokenizerConfig(words=("one", "two", "three"), chat_template=template)
    )
    make_scratch(scratch, folder / "model-init", seed=0)
    config = {
        "model": {"scratch": scratch.model_dump()},
        "data": {"train": {"type": "jsonl", "path": "x"}},
        "rewards": [{"type": "exact"}],
    }
    (folder / "config.json").write_text(json.dumps(config))
    from sluice.models.build import load_tokenizer

    tokenizer = load_tokenizer(folder / "model-init")
    line = lines(capsys, str(folder), "--kind", "episode", "--limit", "1", "--text")[0]
    turns = line["episode"]["segments"][0]["turns"]  # pyright: ignore[reportIndexIssue]
    assert [turn["text"] for turn in turns] == [tokenizer.decode([3, 4]), tokenizer.decode([5, 6])]
    assert all(turn["ids"] for turn in turns)


def test_text_without_a_config_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["episodes", str(folder), "--text"]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder} has no config.json, which names the tokenizer\n  → leave --text away\n"
    )


def test_no_such_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["episodes", "smal"]) == 9
    assert capsys.readouterr().err == (
        "error: there is no run with a log in smal or runs/smal\n  → give the folder of a run\n"
    )


def test_a_pipe_that_closes_early_ends_quietly(folder: Path) -> None:
    request = GroupRequest(2, PROMPT, 5000, SAMPLING)
    with LogWriter(folder / "log") as log:  # far more than a pipe holds
        log.append_many([EpisodeRecord(episode(request, sample)) for sample in range(1000)])
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "episodes", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["kind"] == "run"
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert error == b""
