"""The command line: help, flags, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sluice.cli import app, run
from sluice.config.load import load_recipe
from sluice.errors import EngineError, RewardError

SNAPSHOTS = Path(__file__).parent / "snapshots"
COMMANDS = (
    "", "train", "sft", "dpo", "eval", "generate", "episodes", "report", "export", "doctor", "config", "config show",
    "config schema", "serve", "scale", "models", "models fetch", "engines", "engines install", "engines list",
)  # fmt: skip
RECIPE = """
name = "small"
[model]
path = "model"
[data.train]
type = "jsonl"
path = "train.jsonl"
[[rewards]]
type = "exact"
"""


class Api:
    """Stands for `sluice.orchestrate.api`, and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error: BaseException | None = None

    def _called(self, name: str, *args: Any, **options: Any) -> None:
        self.calls.append((name, args, options))
        if self.error is not None:
            raise self.error

    def train(self, *args: Any, **options: Any) -> None:
        self._called("train", *args, **options)

    def sft(self, *args: Any) -> Path:
        self._called("sft", *args)
        return Path("out")

    def dpo(self, *args: Any) -> Path:
        self._called("dpo", *args)
        return Path("out")

    def evaluate(self, *args: Any) -> dict[str, Any]:
        self._called("evaluate", *args)
        return {"accuracy": 0.5}

    def generate(self, *args: Any, **options: Any) -> list[list[str]]:
        self._called("generate", *args, **options)
        return [["one\ntwo", "ü"] for _ in args[1]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLUICE_TRACEBACK", raising=False)
    Path("small.toml").write_text(RECIPE)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    double = Api()
    names = ("train", "sft", "dpo", "evaluate", "generate")
    module = types.SimpleNamespace(**{name: getattr(double, name) for name in names})
    monkeypatch.setitem(sys.modules, "sluice.orchestrate.api", module)
    monkeypatch.setattr("sluice.orchestrate.api", module, raising=False)
    return double


def sluice(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from sluice.cli import main; main()", *arguments],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_it_was(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Growing the command line is a decision: SLUICE_UPDATE_SNAPSHOTS=1 writes the snapshots anew."""
    for name, value in {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    assert run([*command.split(), "--help"]) == 0
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.strip("\n").splitlines()) + "\n"
    path = SNAPSHOTS / f"help{'-' if command else ''}{command.replace(' ', '-')}.txt"
    if os.environ.get("SLUICE_UPDATE_SNAPSHOTS"):
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8")


def test_every_command_has_a_snapshot() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    groups = {str(group.name) for group in app.registered_groups}
    assert commands | groups == {command.split()[0] for command in COMMANDS if command}


def test_help_in_a_process_of_its_own() -> None:
    done = sluice("--help")
    assert done.returncode == 0
    assert "episodes" in done.stdout
    assert done.stderr == ""
    assert "--install-completion" not in done.stdout


def test_no_arguments_show_the_help_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Usage: sluice" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["trian", "x"], "no such command 'trian'. Did you mean 'train'?\n  → see `sluice --help`"),
        (
            ["train", "small.toml", "--dryrun"],
            "no such flag: --dryrun\n  → did you mean --dry-run? see `sluice train --help`",
        ),
        (["train", "small.toml", "--xyz"], "no such flag: --xyz\n  → see `sluice train --help`"),
        (
            ["train", "small.toml", "--train.optimizer.lr=1"],
            "no such flag: --train.optimizer.lr\n"
            "  → recipe keys are given without dashes: train.optimizer.lr=VALUE",
        ),
        (["config", "sho"], "no such command 'sho'. Did you mean 'show'?\n  → see `sluice config --help`"),
        (["train"], "missing argument 'RECIPE'\n  → see `sluice train --help`"),
        (
            ["train", "small.toml", "--seed", "x"],
            "invalid value for '--seed': Input should be a valid integer, unable to parse string as "
            "an integer\n  → see `sluice train --help`",
        ),
        (
            ["train", "small.toml", "--resume", "--overwrite"],
            "--resume continues the run folder, --overwrite replaces it\n  → give one of them",
        ),
        (
            ["train", "small.toml", "steps=x"],
            "small.toml has 1 problem\n  steps: must be a valid integer, not 'x'  [override 'steps=x']\n"
            "  → `sluice config schema` describes every key",
        ),
        (["train", "smal.toml"], "recipe smal.toml: no such file\n  → did you mean small.toml?"),
        (
            ["generate", "nowhere", "hi"],
            "there is no model folder nowhere\n  → give a folder with config.json and weights",
        ),
        (
            ["episodes", "x", "--kind", "episod"],
            "--kind episod: not one of run, resume, group, episode, reward, disposition, version, checkpoint, "
            "eval, fault, turn\n  → did you mean episode?",
        ),
        (
            ["episodes", "x", "--group", "x1"],
            "--group x1: not the id of a group\n  → give one such as g000017, or its number",
        ),
    ],
)  # fmt: skip
def test_wrong_command_lines(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


def test_dry_run_prints_a_recipe_and_runs_nothing(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "small.toml", "--dry-run", "steps=5", "--seed", "4", "--name", "other"]) == 0
    Path("resolved.toml").write_text(capsys.readouterr().out)
    expected = load_recipe("small.toml", ["steps=5", "seed=4", "name=other"])
    assert load_recipe("resolved.toml") == expected
    assert api.calls == []
    assert not Path("runs").exists()


def test_config_show_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", "small.toml", "steps=6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert run(["config", "show", "small.toml", "steps=6"]) == 0
    assert "steps = 6" in capsys.readouterr().out
    assert run(["config", "schema"]) == 0
    assert "algorithm" in json.loads(capsys.readouterr().out)["properties"]


def test_train_hands_its_flags_on(api: Api) -> None:
    assert run(["train", "small.toml", "--overwrite", "steps=5"]) == 0
    assert run(["train", "small.toml", "--resume"]) == 0
    (_, (first,), options), (_, _, resumed) = api.calls
    assert first == load_recipe("small.toml", ["steps=5"])
    assert options == {"resume": False, "overwrite": True}
    assert resumed == {"resume": True, "overwrite": False}


def test_sft_dpo_and_eval_print_their_result(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    for phase in ("sft", "dpo"):
        assert run([phase, "small.toml", "--out", "there"]) == 0
        assert capsys.readouterr().out == "out\n"
    assert run(["eval", "small.toml", "--model", "model"]) == 0
    assert json.loads(capsys.readouterr().out) == {"accuracy": 0.5}
    assert [call[1][1] for call in api.calls] == [Path("there"), Path("there"), Path("model")]


def test_generate_prints_one_answer_a_line(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    arguments = ["generate", "model", "a", "b", "--n", "2", "--temperature", "0.5", "--max-new-tokens", "9"]
    assert run([*arguments, "--seed", "3"]) == 0
    assert capsys.readouterr().out == "one\\ntwo\nü\none\\ntwo\nü\n"
    name, (model, prompts), options = api.calls[0]
    assert (name, model, prompts) == ("generate", Path("model"), ["a", "b"])
    assert (options["n"], options["seed"]) == (2, 3)
    assert (options["sampling"].temperature, options["sampling"].max_new_tokens) == (0.5, 9)
    assert run([*arguments, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"prompt": prompt, "answers": ["one\ntwo", "ü"]} for prompt in ("a", "b")]


@pytest.mark.parametrize(
    ("error", "code"),
    [(RewardError("it broke", hint="mend it"), 4), (EngineError("gone"), 5)],
)
def test_errors_are_one_block_and_an_exit_code(
    api: Api, error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    api.error = error
    assert run(["train", "small.toml"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_the_traceback_is_shown_on_request(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.error = RewardError("it broke")
    monkeypatch.setenv("SLUICE_TRACEBACK", "1")
    with pytest.raises(RewardError):
        run(["train", "small.toml"])


def test_a_fault_of_ours_is_not_disguised(api: Api) -> None:
    api.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        run(["train", "small.toml"])


def test_interruption_says_how_to_go_on(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.error = KeyboardInterrupt()
    assert run(["train", "small.toml", "rollout.sampling.stop=['a b']", "--seed", "4", "--overwrite"]) == 130
    assert capsys.readouterr().err == (
        "interrupted\n  → resume with: sluice train small.toml "
        "'rollout.sampling.stop=['\"'\"'a b'\"'\"']' --seed 4 --resume\n"
    )


def test_errors_reach_the_shell() -> None:
    done = sluice("train", "none.toml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: recipe none.toml: no such file\n  → give the path of a recipe\n"
    done = sluice("train", "none.toml", SLUICE_TRACEBACK="1")
    assert "Traceback" in done.stderr
