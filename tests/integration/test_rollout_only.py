"""Rollout without training, and rewards judged again: what `replay` trains besides the log of a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.integration.test_replay import proven, replay_of, rows
from tests.tiny import tiny

from sluice.checkpoint.store import CheckpointStore
from sluice.errors import ConfigError, RewardError
from sluice.log import ACCOUNTED, EpisodeRecord, Kind, LogReader, account
from sluice.orchestrate import api


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a run that trains."""
    config = tiny(tmp_path_factory.mktemp("source"), steps=2, evaluation={"every": 0})
    api.train(config)
    return config.folder


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny(tmp_path_factory.mktemp("sampled"), rollout_only=True, steps=3, evaluation={"every": 0})
    summary = api.train(config)
    assert (summary.steps, summary.eval_before, summary.train_tokens_per_second) == (3, None, 0.0)
    return config.folder


def tokens(run: Path) -> dict[str, list[list[int]]]:
    """What was sampled, by episode."""
    records = [entry.record for entry in LogReader(run / "log").read(kinds=(Kind.EPISODE,))]
    episodes = [record.episode for record in records if isinstance(record, EpisodeRecord)]
    return {episode.id: [turn.ids.tolist() for turn in episode.sampled_turns()] for episode in episodes}


def test_rollout_alone_keeps_every_episode_and_moves_no_weight(sampled: Path) -> None:
    found = account(LogReader(sampled / "log").read(kinds=ACCOUNTED))
    assert found.complete
    assert {record.disposition.value for records in found.surviving.values() for record in records} == {"kept"}
    assert len(found.surviving) == 3 * 4 * 4
    assert {row["version/step"] for row in rows(sampled)} == {0}
    checkpoint = CheckpointStore(sampled / "checkpoints", keep=1).latest()
    assert checkpoint is not None
    first, last = (load_file(folder / "model.safetensors") for folder in (sampled / "model-init", checkpoint.model))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_what_was_kept_is_trained_as_old_as_it_is(sampled: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="up to 2 steps old"):
        api.train(replay_of(tmp_path, sampled, steps=3))
    config = replay_of(tmp_path, sampled, "trained", steps=3, data={"gate": {"max_lag": 2}})
    api.train(config)
    assert [row["gate/lag_max"] for row in rows(config.folder)] == [0, 1, 2]
    assert rows(config.folder)[0]["mismatch/mean_abs"] < 1e-5
    proven(config.folder)


def test_the_first_batch_is_what_a_training_run_would_have_had(sampled: Path, source: Path, tmp_path: Path) -> None:
    config = replay_of(tmp_path, sampled, steps=1)
    api.train(config)
    assert rows(config.folder)[0] == pytest.approx(rows(source)[0], abs=1e-6)


def test_rollout_alone_goes_on_where_it_was(sampled: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path, rollout_only=True, steps=1, evaluation={"every": 0})
    api.train(config)
    api.train(config.model_copy(update={"steps": 3}), resume=True)
    assert tokens(config.folder) == tokens(sampled)
    proven(config.folder)


def test_rewards_are_judged_again(source: Path, tmp_path: Path) -> None:
    """Under the recipe's own rewards nothing changes; under another one advantages and metrics are its own."""
    same = replay_of(tmp_path, source, steps=2, replay_rewards="again", rewards=[{"type": "exact"}])
    api.train(same)
    old = rows(source)[:2]
    new = rows(same.folder)
    assert [row["reward/component/exact"] for row in new] == [row["reward/component/exact"] for row in old]
    assert all("reward/component/random" not in row for row in new)
    assert [row["reward/mean"] for row in new] == [row["reward/component/exact"] for row in old]
    proven(same.folder)


def test_rewards_again_need_all_recorded_tasks(source: Path, tmp_path: Path) -> None:
    wrong = replay_of(tmp_path, source, steps=2, replay_rewards="again", rewards=[{"type": "exact", "tasks": ["sums"]}])
    with pytest.raises(RewardError, match="no reward component applies to task 'default'"):
        api.train(wrong)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rollout_only": True, "placement": {"colocate": True}}, "no trainer to take turns with"),
        ({"rollout_only": True, "replay": "elsewhere"}, "choose one"),
        ({"replay_rewards": "again"}, "set replay"),
    ],
)
def test_modes_that_exclude_each_other(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=why):
        tiny(tmp_path, **changes)
