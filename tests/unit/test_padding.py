"""Groups in which episodes failed: repeats of the valid ones, or dropped; counted, and in the log as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import tiny
from tests.unit.buffer_cases import SAMPLING, prompts, scored

from sluice.algos import make_algorithm
from sluice.algos.base import samples_of
from sluice.config.algos import GRPOConfig
from sluice.config.data import Padding
from sluice.data.padding import mostly_failed, pad
from sluice.log import ACCOUNTED, Disposition, Kind, LogReader, account
from sluice.log.records import DispositionRecord
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api
from sluice.orchestrate.setup import make_filters
from sluice.train.packing import make_batch
from sluice.types import Group, GroupRequest, Normaliser, Outcome, Scored

REWARD = """
calls = {}

def moody(prompt, answer):
    "Fails at one answer to each question, and at three of four where the sum is even."
    nth = calls[prompt.id] = calls.get(prompt.id, -1) + 1
    if nth in ((1, 2, 3) if int(prompt.answer) % 2 == 0 else (1,)):
        raise RuntimeError("the verifier is down")
    return float(nth % 2)
"""


def group(*rewards: float | None) -> Group:
    """Members with these rewards; None failed."""
    request = GroupRequest(0, prompts(1)[0], len(rewards), SAMPLING)
    members: list[Scored] = []
    for sample, reward in enumerate(rewards):
        member = scored(request, sample, reward=reward or 0.0)
        if reward is None:
            member = Scored(replace(member.episode, outcome=Outcome.INFRA_FAILURE), None)
        members.append(member)
    return Group(request, tuple(members))


def test_failed_members_become_repeats_of_the_valid_ones_in_turn():
    padded = pad(group(None, 0.25, None, 0.5, None))
    ids = [member.episode.id for member in padded.members]
    assert ids == [f"g000000.{name}" for name in ("1~1", "1", "3~1", "3", "1~2")]
    assert [member.reward.total for member in padded.members if member.reward] == [0.25, 0.25, 0.5, 0.5, 0.25]
    assert len(padded.valid) == 5
    assert [s.episode_id for m in padded.members for s in m.samples] == ids


@pytest.mark.parametrize("whole", [group(0.0, 1.0), group(None, None)])
def test_a_whole_group_and_one_without_valid_members_stay_what_they_are(whole: Group):
    assert pad(whole) is whole


@pytest.mark.parametrize("normaliser", list(Normaliser))
def test_a_repeat_counts_like_an_episode_that_happened_to_be_the_same(normaliser: Normaliser):
    algorithm = make_algorithm(GRPOConfig(), max_new_tokens=8)
    padded, lived = pad(group(1.0, 0.0, None)), group(1.0, 0.0, 1.0)
    one, two = algorithm.credit([padded]), algorithm.credit([lived])
    assert [one[s.key].tolist() for s in samples_of([padded])] == [two[s.key].tolist() for s in samples_of([lived])]
    batches = [make_batch(list(samples_of([g])), budget=64, normaliser=normaliser) for g in (padded, lived)]
    first, second = (np.concatenate([micro.scales for micro in batch.micro_batches]) for batch in batches)
    np.testing.assert_array_equal(first, second)


def test_no_more_than_the_share_is_dropped_before_any_filter_is_asked():
    judge = mostly_failed(0.5)
    assert judge(group(1.0, 0.0, None, None)) == "mostly_failed: 2 of 4 valid"
    assert judge(group(1.0, 0.0, 1.0, None)) == ""
    assert mostly_failed(0.0)(group(1.0, None, None)) == ""


def test_a_run_repeats_drops_and_says_how_often(tmp_path: Path):
    (tmp_path / "moody.py").write_text(REWARD)
    config = tiny(
        tmp_path, data={"padding": {}}, rewards=[{"type": "python", "path": f"{tmp_path / 'moody.py'}:moody"}],
        steps=3, limits={"max_infra_failures": 1.0}, evaluation={"rewards": [{"type": "exact"}], "every": 0},
    )  # fmt: skip
    assert config.data.padding == Padding(min_share=0.5)
    assert len(make_filters(config.data)) == 1
    api.train(config)
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["rollout/repeated"] for row in rows] == [4.0, 4.0, 4.0]
    assert all(row["rollout/repeated_tokens"] >= row["rollout/repeated"] for row in rows)
    found = account(LogReader(config.folder / "log").read(kinds=ACCOUNTED))
    assert found.complete
    fates = [
        entry.record for entry in LogReader(config.folder / "log").read(kinds=(Kind.DISPOSITION,))
        if isinstance(entry.record, DispositionRecord)
    ]  # fmt: skip
    dropped = [fate for fate in fates if fate.disposition is Disposition.DROPPED]
    assert {fate.reason for fate in dropped} == {"filter: mostly_failed: 1 of 4 valid"}
    assert sum(row["rollout/groups_dropped"] for row in rows) == len({fate.group_id for fate in dropped}) > 0
    trained = [fate for fate in fates if fate.disposition is Disposition.TRAINED]
    assert len(trained) == 3 * 4 * 3
    assert all(fate.advantage is not None and len(fate.advantage) == 1 for fate in trained)
