"""Bad input at the level of a whole run: a clear error, the next move, the right exit code, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import SCRATCH, merge, tiny

from sluice import cli
from sluice.config import RunConfig
from sluice.log import ACCOUNTED, Kind, LogReader, LogWriter, account
from sluice.obs.metrics import read_metrics


def saved(config: RunConfig, folder: Path, **changes: Any) -> Path:
    """The config as a recipe file, changed without validation, as a user would write it."""
    raw = merge(json.loads(config.model_dump_json()), changes)
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(raw))
    return recipe


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and what stands on stderr, spaces and line breaks folded."""
    code = cli.run(["train", str(recipe), *arguments])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, " ".join(re.sub(r"[│╭╮╰╯─]", " ", error).split())


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = saved(tiny(tmp_path), tmp_path, data={"train": {"path": str(tmp_path / "question.jsonl")}})
    code, error = refused(capsys, recipe)
    assert code == 3
    assert "question.jsonl" in error
    assert "questions.jsonl" in error, "the nearest existing file is named"


def test_unreadable_row_is_named_by_line_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path)
    source = tmp_path / "questions.jsonl"
    lines = source.read_text().splitlines()
    lines[6] = '{"prompt": "1+1=", "answer": '
    source.write_text("\n".join(lines) + "\n")
    code, error = refused(capsys, saved(config, tmp_path))
    assert code == 3
    assert f"{source}:7" in error
    code = cli.run(["train", str(saved(config, tmp_path)), "data.train.on_bad_row=skip", "steps=1"])
    assert code == 0, "the first try left nothing that would have to be overwritten"


def test_prompt_longer_than_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path)
    with (tmp_path / "questions.jsonl").open("a") as source:
        source.write(json.dumps({"id": "long", "prompt": "1+" * 60 + "1=", "answer": "61"}) + "\n")
    code, error = refused(capsys, saved(config, tmp_path))
    assert code == 3
    assert re.search(r"prompt long has 12\d tokens; the context holds 64", error)


@pytest.mark.parametrize(
    ("body", "said"),
    [("return float('nan')", "nan"), ("return 'good'", "'good'"), ("raise ValueError('no verifier today')", "today")],
    ids=["nan", "string", "raises"],
)
def test_a_reward_that_is_no_number_stops_the_run_and_is_never_a_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, said: str
) -> None:
    file = tmp_path / "reward.py"
    file.write_text(f"def score(prompt, answer):\n    {body}\n")
    config = tiny(
        tmp_path, rewards=[{"type": "python", "path": f"{file}:score"}], evaluation={"rewards": [{"type": "exact"}]}
    )
    code, error = refused(capsys, saved(config, tmp_path))
    assert code == 4
    assert "16 of 16 episodes of this batch are infra failures" in error
    assert said in error
    kinds = [entry.record.kind for entry in LogReader(config.folder / "log").read(from_ordinal=0)]
    assert kinds.count("episode") == 16, "the episodes are in the log"
    faults = [entry.record for entry in LogReader(config.folder / "log").read(kinds=(Kind.FAULT,))]
    assert faults[0].where == "reward of g000000.0"
    assert faults[-1].where == "inline, batch 1, version 0.0"
    assert "RewardError" in faults[-1].traceback
    assert "reward" not in kinds
    file.write_text("def score(prompt, answer):\n    return len(answer) % 2\n")
    code = cli.run(["train", str(saved(config, tmp_path)), "--resume"])  # mended: the same episodes are judged again
    assert code == 0
    assert account(LogReader(config.folder / "log").read(kinds=ACCOUNTED)).complete


def test_unknown_model_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = saved(tiny(tmp_path), tmp_path, model={"scratch": {"architecture": {"model_type": "qwen33"}}})
    code, error = refused(capsys, recipe)
    assert code == 2
    assert "qwen33" in error
    assert "qwen3" in error


def test_a_context_that_the_engine_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = refused(capsys, saved(tiny(tmp_path), tmp_path), "rollout.context_length=100")
    assert code == 5
    assert "rollout.context_length = 100, but embedded-0 holds 64 tokens" in error


def test_an_existing_run_is_neither_overwritten_nor_resumed_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, steps=1)
    recipe = saved(config, tmp_path)
    assert cli.run(["train", str(recipe)]) == 0
    code, error = refused(capsys, recipe)
    assert code == 2
    assert "already holds a run" in error
    assert "--resume continues it" in error
    code, error = refused(capsys, recipe, "--resume", "seed=5")
    assert code == 2
    assert "seed: 0 → 5" in error


def test_two_runs_on_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path, steps=1)
    recipe = saved(config, tmp_path)
    assert cli.run(["train", str(recipe)]) == 0
    with LogWriter(config.folder / "log"):
        code, error = refused(capsys, recipe, "--resume", "steps=2")
        assert code == 9
        assert "process" in error
        kept = sorted(file for file in config.folder.rglob("*") if file.is_file())
        code, error = refused(capsys, recipe, "--overwrite")
        assert code == 9
        assert "two runs cannot share one folder" in error
        assert sorted(file for file in config.folder.rglob("*") if file.is_file()) == kept


FULL_DISK = """
import resource, sys
from sluice import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.run(sys.argv[2:]))
"""


def test_a_full_disk_during_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    """No file may grow beyond the limit: the optimizer's does not fit, the log's does."""
    bigger = merge(SCRATCH, {"architecture": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}})
    config = tiny(tmp_path, steps=2, model={"scratch": bigger}, checkpoint={"every": 1})
    recipe = saved(config, tmp_path)
    command = [sys.executable, "-c", FULL_DISK, "3500000", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    error = " ".join(done.stderr.split())
    assert done.returncode == 8, error
    assert "could not be written" in error
    assert "every finished episode" in error
    assert "Traceback" not in error
    logged = LogReader(config.folder / "log").latest
    assert logged > 0
    assert not list((config.folder / "checkpoints").glob(".*")), "no torn checkpoint is left behind"
    assert cli.run(["train", str(recipe), "--resume"]) == 0
    fate = account(LogReader(config.folder / "log").read(kinds=ACCOUNTED))
    assert fate.complete
    assert len(fate.trained_at(2)) == 16


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, steps=4)
    recipe = saved(config, tmp_path)
    assert cli.run(["train", str(recipe)]) == 0
    straight = read_metrics(config.folder / "metrics.jsonl")
    checkpoints = config.folder / "checkpoints"
    assert sorted(each.name for each in checkpoints.iterdir()) == ["step-000002", "step-000004"]
    (checkpoints / ".step-000006.tmp").mkdir()  # a kill in the middle of a save leaves this
    weights = checkpoints / "step-000004" / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    code, error = refused(capsys, recipe, "--resume", "steps=5")
    assert code == 8
    assert "model.safetensors" in error
    assert "remove" in error
    shutil.rmtree(checkpoints / "step-000004")
    assert cli.run(["train", str(recipe), "--resume", "steps=5"]) == 0
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for name in ("train/loss", "reward/mean", "train/grad_norm"):
        assert [row[name] for row in rows[:4]] == pytest.approx([row[name] for row in straight], rel=1e-6)


def test_a_checkpoint_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path / "one", steps=1)
    wide = merge(SCRATCH, {"architecture": {"intermediate_size": 96}})
    other = tiny(tmp_path / "other", steps=1, model={"scratch": wide})
    recipes = [saved(each, tmp_path / name) for each, name in ((config, "one"), (other, "other"))]
    for recipe in recipes:
        assert cli.run(["train", str(recipe)]) == 0
    mine, theirs = (each.folder / "checkpoints" / "step-000001" for each in (config, other))
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    code, error = refused(capsys, recipes[0], "--resume", "steps=2")
    assert code == 8
    assert "intermediate_size" in error
