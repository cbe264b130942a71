"""DPO as a phase: pairs of an earlier run's log, pairs of a file, alone and before RL; what cannot be learned from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import SCRATCH, merge, tiny

from sluice import cli
from sluice.config import RunConfig
from sluice.config.preferences import PreferenceConfig
from sluice.obs.view import View
from sluice.orchestrate import api
from sluice.orchestrate.recorded import recorded_pairs
from sluice.orchestrate.setup import initial_model
from sluice.orchestrate.trainers import Trainers
from sluice.orchestrate.warm_start import prefer

QUIET = {"evaluation": {"every": 0, "greedy": False}, "data": {"eval_prompts": 0}, "steps": 2}


class Told(View):
    """Keeps what a phase reports."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def progress(self, name: str, step: int, total: int, figures: Any) -> None:
        assert (name, step) == ("dpo", len(self.rows) + 1)
        self.rows.append(dict(figures))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose random rewards make most groups a pair."""
    config = tiny(tmp_path_factory.mktemp("earlier"), **QUIET)
    api.train(config)
    return config


def _prefer(tmp_path: Path, pairs: dict[str, Any], start: Path, steps: int = 12) -> list[dict[str, float]]:
    config = PreferenceConfig.model_validate(
        {"pairs": pairs, "steps": steps, "batch": 4, "beta": 0.5, "train": {"optimizer": {"lr": 3e-3}}}
    )
    told = Told()
    trainers = Trainers("cpu", tmp_path, 1)
    loss = prefer(config, start, tmp_path / "out", seed=0, trainers=trainers, template_kwargs={}, view=told)
    assert loss == told.rows[-1]["loss"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    return told.rows


def test_best_against_worst_of_an_earlier_run(tmp_path: Path, earlier: RunConfig) -> None:
    start = initial_model(earlier, earlier.folder)
    pairs = {"type": "run", "path": str(earlier.folder)}
    config = PreferenceConfig.model_validate({"pairs": pairs}).pairs
    found = recorded_pairs(config, start)  # type: ignore[arg-type]
    assert 0 < len(found) <= 8
    assert all(pair[0].group_id == pair[1].group_id and pair[0].key != pair[1].key for pair in found)
    rows = _prefer(tmp_path, pairs, start)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[0]["accuracy"] == 0.5
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["accuracy"] == 1.0


def test_pairs_of_a_file_alone_and_before_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "pairs.jsonl"
    rows = [{"id": str(a), "prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a)} for a in range(8)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    preferences = {"pairs": {"type": "jsonl", "path": str(source)}, "steps": 4, "batch": 4}
    config = tiny(tmp_path, **QUIET, preferences=preferences)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config.model_dump_json())
    assert cli.run(["dpo", str(recipe)]) == 0
    alone = Path(capsys.readouterr().out.splitlines()[-1])
    assert alone == config.runs_dir / "tiny-dpo"
    assert cli.run(["dpo", str(recipe)]) == 2
    assert "is not empty" in capsys.readouterr().err
    api.train(config)
    inside = config.folder / "model-dpo" / "model.safetensors"
    assert inside.read_bytes() == (alone / "model.safetensors").read_bytes()
    assert inside.read_bytes() != (config.folder / "model-init" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("pairs", "code", "says"),
    [
        ({"type": "run", "path": "EMPTY"}, 3, "holds no log of a run"),
        ({"type": "run", "path": "EARLIER", "min_gap": 5}, 3, "in none of its 8 groups are more than 5 apart"),
        ({"type": "jsonl", "path": "NONE.jsonl"}, 3, "NONE.jsonl does not exist"),
        ({"type": "run", "path": "OTHER"}, 2, "has another tokenizer: its token 9 is '0', that of the policy is '1'"),
        ({"type": "run", "path": "BARE"}, 3, "holds token id"),
    ],
    ids=["no-run", "no-gap", "no-file", "other-tokenizer", "other-ids"],
)
def test_pairs_that_cannot_be_learned_from(
    tmp_path: Path, earlier: RunConfig, capsys: pytest.CaptureFixture[str], pairs: dict[str, Any], code: int, says: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    shutil.copytree(earlier.folder / "log", tmp_path / "BARE" / "log")
    paths = {"EARLIER": earlier.folder, "OTHER": earlier.folder}
    at = str(paths.get(pairs["path"], tmp_path / pairs["path"]))
    model = {"scratch": SCRATCH}
    if pairs["path"] in ("OTHER", "BARE"):
        model = {"scratch": merge(SCRATCH, {"tokenizer": {"words": ["<user>", "<assistant>", "+", "=", "1"]}})}
    config = tiny(tmp_path, **QUIET)
    raw = json.loads(config.model_dump_json()) | {"preferences": {"pairs": {**pairs, "path": at}}, "model": model}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    assert cli.run(["dpo", str(recipe)]) == code
    error = " ".join(capsys.readouterr().err.split())
    assert says in error
    assert cli.run(["dpo", str(recipe), "preferences=none"]) == 2
    assert "this recipe has no preferences" in capsys.readouterr().err
