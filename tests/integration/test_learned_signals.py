"""Runs whose learning signal is another model's: a critic that is trained beside the policy, a teacher that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tests.tiny import SCRATCH, merge, tiny

from sluice import cli
from sluice.checkpoint.store import CheckpointStore
from sluice.config import RunConfig
from sluice.config.model import ScratchConfig
from sluice.models.build import make_scratch
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api

QUIET = {"evaluation": {"every": 0, "greedy": False}, "data": {"eval_prompts": 0}}
PPO = {
    "algorithm": {
        "type": "ppo", "gae_lambda": 0.9, "updates_per_batch": 2,
        "critic": {"updates": 2, "warmup_batches": 2, "optimizer": {"lr": 5e-3}},
    },
    "rewards": [{"type": "exact"}, {"type": "random"}],
}  # fmt: skip


def _rows(config: RunConfig) -> list[dict[str, float]]:
    rows = read_metrics(config.folder / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "checkpoint/", "eval/seconds"))}
        for row in rows
    ]


def test_ppo_trains_a_critic_alone_and_then_both(tmp_path: Path) -> None:
    config = tiny(tmp_path, **merge({**QUIET, "steps": 4, "checkpoint": {"every": 2}}, PPO))
    api.train(config)
    rows = _rows(config)
    for row in rows:
        assert row["critic/loss"] > 0
        assert row["critic/grad_norm"] > 0
        assert 0 <= row["critic/clip_fraction"] <= 1
        assert row["critic/explained_variance"] <= 1
    assert [row["train/grad_norm"] > 0 for row in rows] == [False, False, True, True]
    assert [row["version/step"] for row in rows] == [2, 4, 6, 8]
    assert rows[0]["critic/value_mean"] == 0, "values begin at zero"
    assert rows[1]["critic/value_mean"] != 0

    start = load_file(config.folder / "model-init" / "model.safetensors")
    warmed, done = CheckpointStore(config.folder / "checkpoints", keep=2).all()
    same, trained = (load_file(each.model / "model.safetensors") for each in (warmed, done))
    assert all((same[name] == start[name]).all() for name in start), "the policy waits while the critic warms up"
    assert any((trained[name] != start[name]).any() for name in start)
    assert done.critic.is_dir()

    again = RunConfig.model_validate(merge(json.loads(config.model_dump_json()), {"name": "again", "steps": 3}))
    api.train(again)
    longer = RunConfig.model_validate(merge(json.loads(again.model_dump_json()), {"steps": 4}))
    api.train(longer, resume=True)
    for mine, theirs in zip(_rows(longer), rows, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the tiny run's tokenizer, of another family and other weights: sharper than the student."""
    folder = tmp_path_factory.mktemp("teacher") / "big"
    changed = {"architecture": {"model_type": "llama", "initializer_range": 0.2, "num_hidden_layers": 1}}
    make_scratch(ScratchConfig.model_validate(merge(SCRATCH, changed)), folder, seed=5)
    return folder


def _distilled(tmp_path: Path, teacher: Path, **changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        **QUIET,
        "algorithm": {"type": "opd", "teacher": "big"},
        "teachers": [{"name": "big", "path": str(teacher)}],
        "rewards": [{"type": "random"}],
        "steps": 15,
        "groups_per_step": 8,
        "train": {"optimizer": {"lr": 1e-2}},
        "checkpoint": {"every": 0},
    }
    return tiny(tmp_path, **merge(base, changes))


def test_a_student_approaches_its_teacher_whatever_the_reward(tmp_path: Path, teacher: Path) -> None:
    config = _distilled(tmp_path, teacher)
    api.train(config)
    distance = [row["train/teacher_kl"] for row in _rows(config)]
    assert distance[0] > 0.5
    assert sum(distance[-3:]) / 3 < 0.7 * distance[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teachers": []}, "requires the teacher 'big', and teachers names none"),
        ({"teachers": [{"name": "big", "path": "NOWHERE"}]}, "NOWHERE does not exist"),
        ({"algorithm": {"type": "grpo"}}, "teachers names 'big', which the algorithm does not ask"),
        ({"teachers": [{"name": "big", "path": "OTHER"}]}, "has another tokenizer: its token 9 is '1', that of the"),
    ],
    ids=["none", "no-folder", "not-asked", "other-tokenizer"],
)
def test_teachers_are_refused_before_anything_is_trained(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], says: str
) -> None:
    if changes.get("teachers") == [{"name": "big", "path": "OTHER"}]:
        other = merge(SCRATCH, {"tokenizer": {"words": ["<user>", "<assistant>", "+", "=", "1"]}})
        make_scratch(ScratchConfig.model_validate(other), tmp_path / "other", seed=0)
        changes = {"teachers": [{"name": "big", "path": str(tmp_path / "other")}]}
    raw = {**json.loads(_distilled(tmp_path, teacher).model_dump_json()), **changes}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    assert cli.run(["train", str(recipe)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert says in error
    assert not (tmp_path / "runs" / "tiny" / "weights").exists()
