"""Runs of agents on the tiny tool model: it adds two digits with the tool `add`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import merge

from sluice.config import RunConfig
from sluice.log import EpisodeRecord, Kind, LogReader, RewardRecord
from sluice.types import Episode, Reward

ROOT = Path(__file__).parents[2]


def config(folder: Path, model: Path, runner: dict[str, Any], **changes: Any) -> RunConfig:
    """Two steps of four episodes."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "sums.jsonl"
    pairs = [(a, b) for a in range(4) for b in range(4)]
    rows = [{"id": f"s{a}{b}", "prompt": f"add {a} {b}", "answer": str(a + b)} for a, b in pairs]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base: dict[str, Any] = {
        "name": "agents",
        "runs_dir": str(folder / "runs"),
        "threads": 1,
        "device": "cpu",
        "model": {"path": str(model)},
        "data": {
            "train": {"type": "jsonl", "path": str(source)},
            "eval_prompts": 0,
            "strategy": {"type": "groups", "samples": 2},
        },
        "rewards": [{"type": "random"}],
        "rollout": {
            "sampling": {"max_new_tokens": 60},
            "embedded": {"kv_tokens": 16384},
            "chat": {"format": "qwen"},
            "runner": runner,
        },
        "steps": 2,
        "groups_per_step": 2,
        "train": {"optimizer": {"lr": 1e-5}},
        "obs": {"tensorboard": False, "live": False},
        "limits": {"stall_seconds": 120.0},
    }
    return RunConfig.model_validate(merge(base, changes))


def episodes(run: RunConfig) -> dict[str, Episode]:
    """Every logged episode, newest record of each."""
    records = (entry.record for entry in LogReader(run.folder / "log").read(kinds=(Kind.EPISODE,)))
    return {record.episode.id: record.episode for record in records if isinstance(record, EpisodeRecord)}


def rewards(run: RunConfig) -> dict[str, Reward]:
    """Every logged reward by episode."""
    records = (entry.record for entry in LogReader(run.folder / "log").read(kinds=(Kind.REWARD,)))
    return {record.episode_id: record.reward for record in records if isinstance(record, RewardRecord)}
