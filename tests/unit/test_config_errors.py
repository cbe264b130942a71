"""What a user reads when a recipe is wrong, word for word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sluice.config.algos import RLOOConfig
from sluice.config.data import JsonlSource, SourceConfig
from sluice.config.load import load_recipe
from sluice.config.rewards import RewardConfig
from sluice.config.run import RunConfig
from sluice.config.shape import parts_of, tag_of
from sluice.config.train import TrainConfig
from sluice.errors import ConfigError

GOOD = """
[model]
path = "model"
[data.train]
type = "jsonl"
path = "train.jsonl"
[[rewards]]
type = "exact"
"""
HINT = "\n  → `sluice config schema` describes every key"


def types(union: Any) -> str:
    return ", ".join(tag_of(part) for part in parts_of(union))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.toml").write_text(GOOD)


def message(ref: str, *overrides: str, flags: dict[str, tuple[str, object]] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(ref, overrides, flags=flags)
    return str(caught.value).removesuffix(HINT)


def test_every_problem_is_listed_with_its_line() -> None:
    Path("bad.toml").write_text(
        """# a recipe with a fault in most lines
steps = -1
sede = 3

[model]
path = "model"

[data]
train = { type = "jsonl", path = "a.jsonl", colums = { prompt = "q" } }
strategy.type = "grops"

[[rewards]]
type = "exact"

[[rewards]]
type = "numric"

[train]
lr = 1e-3

[train.optimizer]
schedule = "cosin"
betas = [0.9]

[algorithm]
type = "grpo"
normaliser = "tokens"
kl.where = "loss"
"""
    )
    assert message("bad.toml", "rollout.sampling.temprature=1", "rewards.0.weight=heavy").splitlines() == [
        "bad.toml has 12 problems",
        "  data.train.colums: unknown key, did you mean 'columns'? "
        f"Valid here: {', '.join(JsonlSource.model_fields)}  [bad.toml:9]",
        "  data.strategy.type: 'grops' is not valid, did you mean 'groups'? "
        "Valid: groups, curriculum, python  [bad.toml:10]",
        "  rewards.0.weight: must be a valid number, not 'heavy'  [override 'rewards.0.weight=heavy']",
        f"  rewards.1.type: 'numric' is not valid, did you mean 'numeric'? Valid: {types(RewardConfig)}  [bad.toml:16]",
        "  algorithm.normaliser: 'tokens' is not valid, did you mean 'token'? "
        "Valid: token, sequence, episode, constant  [bad.toml:27]",
        "  algorithm.kl.coefficient: missing (Weight of the penalty)  [bad.toml:28]",
        "  rollout.sampling.temprature: unknown key, did you mean 'temperature'? "
        "Valid here: temperature, top_p, top_k, min_p, max_new_tokens, stop, stop_token_ids  "
        "[override 'rollout.sampling.temprature=1']",
        "  steps: must be greater than or equal to 0, not -1  [bad.toml:2]",
        "  train.optimizer.betas.1: missing  [bad.toml:23]",
        "  train.optimizer.schedule: 'cosin' is not valid, did you mean 'cosine'? "
        "Valid: constant, linear, cosine  [bad.toml:22]",
        "  train.lr: unknown key, did you mean 'train.optimizer.lr'? "
        f"Valid here: {', '.join(TrainConfig.model_fields)}  [bad.toml:19]",
        f"  sede: unknown key, did you mean 'seed'? Valid here: {', '.join(RunConfig.model_fields)}  [bad.toml:3]",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.lr=1e-3", "train.lr: unknown key, did you mean 'train.optimizer.lr'?"),
        ("zzz=1", "zzz: unknown key, valid here: name, seed,"),
        ("seed=x", "seed: must be a valid integer, not 'x'"),
        ("algorithm.type=grppo", "algorithm.type: 'grppo' is not valid, did you mean 'grpo'?"),
        ("data.train=3", "data.train: must be a table, not 3"),
        ("rewards=[]", "rewards: must have at least 1 item, not []"),
        ("data.eval.path=x", f"data.eval.type: missing; one of {types(SourceConfig)}"),
        ("steps", "'steps' is not KEY=VALUE, such as train.optimizer.lr=1e-4"),
        ("=1", "'=1' is not KEY=VALUE, such as train.optimizer.lr=1e-4"),
        ("a..b=1", "'a..b' is not a dotted key"),
        ("model.path.x=1", "model.path is 'model': nothing can be set inside it"),
        ("rewards.2.weight=1", "there is no item 2: the list has 1"),
        ("rewards.exact.weight=1", "rewards is a list: 'exact' is not a position in it"),
        ("name=a/b", "name: must match pattern"),
        ("rollout.engine=sglan", "rollout.engine: 'sglan' is neither 'embedded' nor 'sglang' nor the URL"),
        ('rollout.sglang.urls=["http://h:1"]', "rollout: sglang.urls are read with engine = 'sglang'"),
        ('rollout.sglang.groups=[{role="prefill"}]', "rollout.sglang: groups have the role 'prefill' alone"),
        ("rollout.sampling.temperature=0", "rollout.sampling.temperature = 0 is greedy"),
        ("data.gate.order=completion", "data.gate: gate.max_lag = 0 trains the next groups in dispatch order"),
        ("limits.max_mismatch=inf", "limits.max_mismatch: must be a finite number, not inf"),
    ],
)
def test_an_override_is_named(override: str, problem: str) -> None:
    text = message("good.toml", override)
    assert text.startswith(f"good.toml has 1 problem\n  {problem}")
    assert text.endswith(f"  [override '{override}']")


def test_a_flag_is_named() -> None:
    text = message("good.toml", flags={"name": ("--name", "a b")})
    assert text.endswith("  [--name a b]")


def test_settings_of_the_type_that_an_override_replaced() -> None:
    Path("std.toml").write_text(GOOD + '[algorithm]\nstd = "sample"\n')
    assert message("std.toml", "algorithm.type=rloo") == (
        f"std.toml has 1 problem\n  algorithm.std: unknown key, valid here: {', '.join(RLOOConfig.model_fields)} "
        "(the keys of type 'rloo', chosen by override 'algorithm.type=rloo')  [std.toml:10]"
    )


def test_rules_over_several_keys_name_the_line_that_the_recipe_set() -> None:
    Path("odd.toml").write_text("groups_per_step = 5\n" + GOOD + "[algorithm]\nupdates_per_batch = 2\n")
    assert message("odd.toml").endswith(
        "groups_per_step = 5 is not divisible by algorithm.updates_per_batch = 2  [odd.toml:1]"
    )


def test_toml_syntax_has_a_line() -> None:
    Path("syntax.toml").write_text("seed = 1\nname = \n")
    assert message("syntax.toml") == "syntax.toml:2 is not valid TOML: Invalid value"
    Path("open.toml").write_text("seed = [1,\n")
    assert message("open.toml").startswith("open.toml:2 is not valid TOML: ")
    Path("twice.toml").write_text("seed = 1\nseed = 2\n")
    assert message("twice.toml") == "twice.toml:2 is not valid TOML: Cannot overwrite a value"


def test_json_syntax_has_a_line() -> None:
    Path("syntax.json").write_text('{"seed": 1,\n oops}')
    assert message("syntax.json").startswith("syntax.json:2 is not valid JSON: ")
    Path("list.json").write_text("[]")
    assert message("list.json") == "list.json must hold a JSON object"


def test_files_that_cannot_be_read() -> None:
    assert message("goood.toml") == "recipe goood.toml: no such file\n  → did you mean good.toml?"
    assert message("good") == "recipe good: no such file\n  → did you mean good.toml?"
    assert message("far/away.toml") == "recipe far/away.toml: no such file\n  → give the path of a recipe"
    Path("note.txt").write_text("")
    assert message("note.txt") == "recipe note.txt: not a .toml, .py, .json file"
    Path("latin.toml").write_bytes(b'name = "\xe9"')
    assert message("latin.toml").startswith("latin.toml is not UTF-8 text: ")


def test_python_recipes_that_fail() -> None:
    Path("r.py").write_text(
        """from sluice.config.train import OptimizerConfig

def wrong_value():
    return OptimizerConfig(lr=-1, scheduel="linear")

def wrong_dict():
    return {"steps": 1, "model": {"path": "m"}, "rewards": [{"type": "exact"}], "data": {"trian": 1}}

def raises():
    return {}["x"]

def needs(size):
    return {}

def number():
    return 3

OTHER = 4
"""
    )
    assert message("r.py:wrong_value").splitlines() == [
        "r.py:wrong_value has 2 problems",
        "  OptimizerConfig.lr: must be greater than 0, not -1  [r.py:4]",
        "  OptimizerConfig.scheduel: unknown key, did you mean 'schedule'? Valid here: lr, betas, eps, "
        "weight_decay, clip_grad, schedule, warmup_steps, final_lr_ratio  [r.py:4]",
    ]
    assert message("r.py:wrong_dict").splitlines() == [
        "r.py:wrong_dict has 2 problems",
        "  data.train: missing (Prompts to train on)  [r.py:wrong_dict()]",
        "  data.trian: unknown key, did you mean 'train'? Valid here: train, eval, eval_prompts, shuffle, strategy, "
        "filters, padding, gate  [r.py:wrong_dict()]",
    ]
    assert message("r.py:raises") == ("the recipe raised KeyError: 'x'  [r.py:10]\n  → SLUICE_TRACEBACK=1 shows where")
    assert message("r.py:needs").startswith("r.py:needs() needs size: the command line calls a recipe without")
    assert message("r.py:number").startswith("r.py:number() returned int; a recipe returns a RunConfig or a dict")
    assert message("r.py:OTHER") == "r.py:OTHER is a int; a recipe is a function"
    assert message("r.py:raise") == (
        "r.py has no function 'raise'; it has wrong_value, wrong_dict, raises, needs, number\n"
        "  → did you mean r.py:raises?"
    )


def test_python_syntax_has_a_line() -> None:
    Path("s.py").write_text("x = 1\ndef recipe(:\n")
    assert message("s.py").startswith("the recipe raised SyntaxError: invalid syntax (s.py, line 2)  [s.py:2]")
