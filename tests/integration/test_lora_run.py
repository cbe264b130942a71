"""A run that trains adapters: it learns, engine and trainer agree, it resumes, and its checkpoints are plain models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import tiny

from sluice.config import RunConfig
from sluice.log import Kind, LogReader
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api

REWARD = '''
def sevens(prompt, answer):
    """Share of sevens."""
    return answer.count("7") / 6
'''


def recipe(folder: Path, steps: int) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sevens.py").write_text(REWARD)
    return tiny(
        folder,
        # The head stays as it is drawn: with the usual 0.02 no hidden state could make any token likely.
        model={"scratch": {"architecture": {"initializer_range": 0.3}}},
        steps=steps,
        rewards=[{"type": "python", "path": f"{folder / 'sevens.py'}:sevens"}],
        train={"optimizer": {"lr": 2e-2}, "lora": {"rank": 4, "alpha": 8}},
        algorithm={"type": "grpo", "kl": {"coefficient": 1e-3, "where": "loss"}},
        evaluation={"every": 0, "greedy": False},
    )


def test_a_run_resumes_where_it_was(tmp_path: Path) -> None:
    whole, parts = recipe(tmp_path / "whole", 6), recipe(tmp_path / "parts", 4)
    api.train(whole)
    api.train(parts)
    api.train(parts.model_copy(update={"steps": 6}), resume=True)
    left, right = (
        load_file(each.folder / "checkpoints/step-000006/model/model.safetensors") for each in (whole, parts)
    )
    start = load_file(whole.folder / "model-init/model.safetensors")
    assert left.keys() == right.keys() == start.keys(), "a plain model, nothing of adapters in it"
    assert all(torch.equal(left[name], right[name]) for name in left)
    changed = {name for name in start if not torch.equal(start[name], left[name])}
    assert changed == {name for name in start if "_proj" in name}
    rows = read_metrics(whole.folder / "metrics.jsonl")
    assert max(row["mismatch/mean_abs"] for row in rows) <= 1e-5, "the engine serves merged weights"
    assert sum(1 for _ in LogReader(parts.folder / "log").read(kinds=(Kind.VERSION,))) >= 7


@pytest.mark.slow
def test_adapters_learn(tmp_path: Path) -> None:
    config = recipe(tmp_path, 40)
    api.train(config)
    rewards = [row["reward/mean"] for row in read_metrics(config.folder / "metrics.jsonl")]
    assert sum(rewards[:4]) / 4 < 0.2
    assert sum(rewards[-4:]) / 4 > 0.8
