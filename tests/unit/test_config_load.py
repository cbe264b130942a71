"""Recipes: what is read, how overrides and defaults come together, which paths are meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sluice.config import RunConfig
from sluice.config.load import load_recipe, resolved_json, resolved_toml, schema
from sluice.config.rewards import NumericReward
from sluice.errors import ConfigError

TOML = """
name = "small"
[model]
path = "model"
[data.train]
type = "jsonl"
path = "train.jsonl"
[[rewards]]
type = "exact"
"""

PYTHON = """
from sluice.config import RunConfig
from sluice.config.algos import GRPOConfig
from sluice.config.data import DataConfig, JsonlSource
from sluice.config.model import ModelConfig
from sluice.config.rewards import ExactReward

def recipe(steps: int = 7) -> RunConfig:
    return RunConfig(
        name="py",
        steps=steps,
        model=ModelConfig(path="model"),
        data=DataConfig(train=JsonlSource(path="train.jsonl")),
        rewards=(ExactReward(),),
        algorithm=GRPOConfig(clip_high=0.3),
    )

def as_dict() -> dict:
    return recipe(9).model_dump()
"""


@pytest.fixture
def toml(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(TOML)
    return str(path)


@pytest.fixture
def python(tmp_path: Path) -> str:
    path = tmp_path / "small.py"
    path.write_text(PYTHON)
    return str(path)


def test_toml(toml: str) -> None:
    config = load_recipe(toml)
    assert config.name == "small"
    assert config.data.strategy.samples == 8


def test_python_function_and_dict(python: str) -> None:
    assert load_recipe(python).steps == 7
    assert load_recipe(f"{python}:as_dict").steps == 9


def test_python_recipe_imports_its_neighbour(tmp_path: Path, python: str) -> None:
    (tmp_path / "variant.py").write_text("import small\ndef recipe():\n    return small.recipe(steps=3)\n")
    assert load_recipe(str(tmp_path / "variant.py")).steps == 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.optimizer.lr=1e-3", "train.optimizer.lr", 1e-3),
        ("rollout.engine=http://127.0.0.1:30000", "rollout.engine", "http://127.0.0.1:30000"),
        ("data.strategy.samples=16", "data.strategy.samples", 16),
        ("seed=3", "seed", 3),
        ("name=123", "name", "123"),
        ('name="a"', "name", "a"),
        ("rollout.sampling.stop=['a', 'b']", "rollout.sampling.stop", ("a", "b")),
        ("algorithm.kl.coefficient=0.1", "algorithm.kl.coefficient", 0.1),
        ("algorithm={type = 'rloo', clip_low = 0.1}", "algorithm.clip_low", 0.1),
        ("algorithm.normaliser=token", "algorithm.normaliser", "token"),
        ("data.gate.order=none", "data.gate.order", None),
        ("obs.tensorboard=false", "obs.tensorboard", False),
        ("train.optimizer.betas=[0.8, 0.9]", "train.optimizer.betas", (0.8, 0.9)),
        ('model.chat_template_kwargs."a.b"=1', "model.chat_template_kwargs", {"a.b": 1}),
        ("model.chat_template_kwargs.date=2020-01-01x", "model.chat_template_kwargs", {"date": "2020-01-01x"}),
    ],
)
@pytest.mark.parametrize("kind", ["toml", "python"])
def test_override(kind: str, override: str, key: str, value: object, request: pytest.FixtureRequest) -> None:
    found: object = load_recipe(request.getfixturevalue(kind), [override])
    for step in key.split("."):
        found = getattr(found, step)
    assert found == value


def test_overrides_of_list_items(toml: str) -> None:
    config = load_recipe(toml, ["rewards.0.weight=2", "rewards.1.type=numeric", "rewards.1.rel_tol=0.1"])
    assert config.rewards[0].weight == 2
    assert config.rewards[1] == NumericReward(rel_tol=0.1)


def test_override_makes_a_list(toml: str) -> None:
    assert len(load_recipe(toml, ["data.filters.0.type=spread"]).data.filters) == 1


def test_the_last_override_wins_and_flags_come_last(toml: str) -> None:
    config = load_recipe(toml, ["seed=1", "seed=2", "name=a"], flags={"name": ("--name", "b")})
    assert (config.seed, config.name) == (2, "b")


def test_another_type_takes_nothing_of_the_default(toml: str) -> None:
    assert load_recipe(toml, ["algorithm.type=rloo"]).algorithm.type == "rloo"


def test_a_table_changes_the_default_it_stands_for(toml: str) -> None:
    demonstrations = ["warm_start.demonstrations.type=jsonl", "warm_start.demonstrations.path=d.jsonl"]
    config = load_recipe(toml, [*demonstrations, "warm_start.demonstrations.columns.prompt=question"])
    assert config.warm_start is not None
    assert config.warm_start.demonstrations.columns.answer == "response"


def test_paths_beside_the_recipe_are_absolute_others_stay(tmp_path: Path, toml: str) -> None:
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "score.py").write_text("")
    config = load_recipe(toml, ["data.eval.type=jsonl", "data.eval.path=train.jsonl"])
    assert config.data.train.path == tmp_path / "train.jsonl"
    assert config.model.path == Path("model")
    assert config.data.eval is not None
    assert config.data.eval.path == Path("train.jsonl"), "an override is relative to the working directory"


def test_import_paths_beside_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TOML.replace('"exact"', '"python"\npath = "score.py:f"\nparams = { path = "score.py" }'))
    (tmp_path / "score.py").write_text("")
    reward = load_recipe(str(path)).rewards[0]
    assert reward.path == f"{tmp_path / 'score.py'}:f"
    assert reward.params == {"path": "score.py"}, "free-form tables are not touched"


@pytest.mark.parametrize("kind", ["toml", "python"])
def test_resolved_forms_are_recipes_again(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    awkward = 'system = "a \\"b\\"\\n\\u007f ü"'
    overrides = [f"data.train.{awkward.replace(' = ', '=', 1)}", "algorithm.kl.coefficient=1e-7"]
    overrides += ["data.filters=[{type='spread'}, {type='min_valid'}]", "model.chat_template_kwargs.'x y'=[{a=[1.5]}]"]
    config = load_recipe(request.getfixturevalue(kind), overrides)
    (tmp_path / "again.toml").write_text(resolved_toml(config))
    (tmp_path / "again.json").write_text(resolved_json(config))
    assert load_recipe(str(tmp_path / "again.toml")) == config
    assert load_recipe(str(tmp_path / "again.json")) == config
    assert RunConfig.model_validate_json(resolved_json(config)) == config


def test_schema_describes_keys() -> None:
    found = schema()
    assert found["properties"]["steps"]["description"] == "Batches to train on."
    assert json.dumps(found)


def test_a_null_inside_a_free_form_list_is_refused_in_toml_only(python: str) -> None:
    base = load_recipe(python)
    config = base.model_copy(update={"model": base.model.model_copy(update={"chat_template_kwargs": {"a": [None]}})})
    assert "null" in resolved_json(config)
    with pytest.raises(ConfigError, match=r"model\.chat_template_kwargs\.a holds a null"):
        resolved_toml(config)
