"""The table of algorithms: its entries are valid recipes, finished runs are kept, a row says whether it learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from benchmarks import algorithms
from benchmarks.algorithm_entries import ENTRIES

from sluice.config.algos import AlgorithmConfig
from sluice.config.load import load_recipe
from sluice.config.preferences import PreferenceConfig, RecordedPairs
from sluice.errors import ConfigError

FIGURES = {
    "eval_before": 0.4, "eval_after": 0.9, "greedy_before": 0.3, "greedy_after": 0.95, "steps": 12, "updates": 24,
    "episodes": 3072, "wall_seconds": 31.0, "cpu_seconds": 40.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_a_recipe_that_starts_from_the_shared_model(name: str, tmp_path: Path) -> None:
    config = load_recipe(str(algorithms.write_recipe(tmp_path, name, 3)))
    assert config.seed == 3
    assert config.model.path == tmp_path / "start-3"
    assert config.warm_start is None
    assert config.evaluation.every == 0
    assert bool(ENTRIES[name].should_not_learn) == (config.rewards[0].type == "random")


def test_every_method_has_an_entry(tmp_path: Path) -> None:
    methods = {kind.model_fields["type"].default for kind in get_args(get_args(AlgorithmConfig)[0])}
    tried = {load_recipe(str(algorithms.write_recipe(tmp_path, name, 0))).algorithm.type for name in ENTRIES}
    assert methods - {"python"} <= tried


def test_what_is_recorded_comes_from_the_shared_model_and_is_what_is_trained_on(tmp_path: Path) -> None:
    recipe = algorithms.write_recipe(tmp_path, "dpo", 3)
    config, first = load_recipe(str(recipe)), load_recipe(str(algorithms.recording(recipe)))
    assert isinstance(config.preferences, PreferenceConfig)
    assert isinstance(config.preferences.pairs, RecordedPairs)
    assert config.preferences.pairs.path == first.folder
    assert config.steps == 0
    assert first.preferences is None
    assert first.model == config.model
    assert first.data == config.data
    grpo = load_recipe(str(algorithms.write_recipe(tmp_path, "grpo", 3)))
    assert first.steps * first.groups_per_step == grpo.steps * grpo.groups_per_step
    both = algorithms.digest(recipe)
    algorithms.recording(recipe).write_text("{}")
    assert algorithms.digest(recipe) != both


def test_a_finished_run_is_kept_and_a_changed_recipe_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def spawn(*arguments: str, log: Path) -> None:
        ran.append(log.stem)
        recipe, result = Path(arguments[-2]), Path(arguments[-1])
        result.write_text(json.dumps(FIGURES | {"recipe": algorithms.digest(recipe)}))

    monkeypatch.setattr(algorithms, "spawn", spawn)
    (tmp_path / "start-0").mkdir()
    first = algorithms.run_all(tmp_path, ["grpo", "gspo"], [0], jobs=1)
    assert ran == ["grpo-0", "gspo-0"]
    assert algorithms.run_all(tmp_path, ["grpo", "gspo"], [0], jobs=1) == first
    assert ran == ["grpo-0", "gspo-0"]
    monkeypatch.setitem(ENTRIES, "gspo", ENTRIES["grpo"])
    algorithms.run_all(tmp_path, ["grpo", "gspo"], [0], jobs=1)
    assert ran == ["grpo-0", "gspo-0", "gspo-0"]


def test_a_wrong_entry_is_told_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENTRIES, "wrong", algorithms.Entry(('algorithm={type="gspoo"}',)))
    with pytest.raises(ConfigError, match="gspo"):
        algorithms.run_all(tmp_path, ["grpo", "wrong"], [0], jobs=1)
    assert not (tmp_path / "start-0").exists()


def test_the_page_shows_the_results() -> None:
    rows = json.loads((algorithms.ROOT / "benchmarks" / "results" / "algorithms.json").read_text())["rows"]
    page = (algorithms.ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for line in rows:
        after, greedy = (" ".join(f"{run[key]:.2f}" for run in line["runs"]) for key in ("eval_after", "greedy_after"))
        assert f"| `{line['algorithm']}` | {after} | {greedy} |" in page
    assert {line["algorithm"] for line in rows} == set(ENTRIES)
    assert [line["algorithm"] for line in rows if not line["learns"]] == ["grpo_random_reward"]


def test_a_row_says_whether_every_seed_learnt() -> None:
    good, bad = FIGURES | {"seed": 0}, FIGURES | {"seed": 1, "eval_after": 0.5}
    assert algorithms.row("grpo", [good, good])["learns"] is True
    line = algorithms.row("grpo_random_reward", [good, bad])
    assert line["learns"] is False
    table = algorithms.markdown([line])
    assert "0.900 0.500" in table
    assert ENTRIES["grpo_random_reward"].should_not_learn in table
    assert "12 (24)" in table
