"""Advantages of REINFORCE++-baseline, DAPO and the others in float64 by hand; groups that have nothing to compare."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.unit.test_algos import group

from sluice.algos import make_algorithm
from sluice.algos.overlong import Overlong
from sluice.config.algos import (
    AlgorithmConfig,
    CISPOConfig,
    DAPOConfig,
    DecoupledConfig,
    DISConfig,
    GRPOConfig,
    GSPOConfig,
    IcePopGRPOConfig,
    ReinforcePPBaselineConfig,
    ReinforcePPConfig,
    RLOOConfig,
)
from sluice.config.data import GateConfig, OnStale, SpreadFilter
from sluice.config.load import load_recipe
from sluice.config.policy_gradient import KLConfig, OverlongConfig
from sluice.data.filters import make_filter
from sluice.data.gate import Gate
from sluice.errors import ConfigError
from sluice.types import Group, Normaliser, Scored, Version


def advantages(config: AlgorithmConfig, groups: list[Group], max_new_tokens: int = 100) -> list[list[float]]:
    """Advantages of the sampled tokens of every valid member, in order."""
    found = make_algorithm(config, max_new_tokens=max_new_tokens).credit(groups)
    samples = [sample for one in groups for member in one.valid for sample in member.samples]
    for sample in samples:
        assert found[sample.key].dtype == np.float64
        assert not found[sample.key][sample["version"] < 0].any(), "advantage outside the sampled tokens"
    return [found[sample.key][sample["version"] >= 0].tolist() for sample in samples]


def test_reinforce_pp_baseline_centres_groups_and_normalises_over_the_tokens_of_the_batch() -> None:
    rewards, lengths = [[1.0, 0.0, None, 0.5], [3.0, 2.0]], [[2, 5, 4, 3], [1, 4]]
    groups = [group(n, r, lengths[n]) for n, r in enumerate(rewards)]
    tokens: list[float] = []
    for r, length in zip(rewards, lengths, strict=True):
        valid = [(x, n) for x, n in zip(r, length, strict=True) if x is not None]
        mean = math.fsum(x for x, _ in valid) / len(valid)
        tokens += [x - mean for x, n in valid for _ in range(n)]
    mean, deviation = statistics.fmean(tokens), statistics.pstdev(tokens)
    found = advantages(ReinforcePPBaselineConfig(eps=0), groups)
    assert [a for sample in found for a in sample] == pytest.approx([(x - mean) / deviation for x in tokens])


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_pp_takes_the_penalty_from_each_token_on(baseline: bool) -> None:
    one = group(0, [1.0, 0.0], [2, 3])
    draw = np.random.default_rng(3)
    members: list[Scored] = []
    tokens: list[float] = []
    for member, reward in zip(one.members, [0.5, -0.5] if baseline else [1.0, 0.0], strict=True):
        (sample,) = member.samples
        scored = sample.with_streams(proximal=draw.normal(size=len(sample)), reference=draw.normal(size=len(sample)))
        members.append(replace(member, samples=(scored,)))
        at = [t for t in range(len(sample)) if sample["version"][t] >= 0]
        penalty = [0.2 * (float(scored["proximal"][t]) - float(scored["reference"][t])) for t in at]
        tokens += [reward - math.fsum(penalty[i:]) for i in range(len(at))]
    mean, deviation = statistics.fmean(tokens), statistics.pstdev(tokens)
    kl = KLConfig(coefficient=0.2, where="reward", estimator="k1")
    config = ReinforcePPBaselineConfig(eps=0, kl=kl) if baseline else ReinforcePPConfig(eps=0, kl=kl)
    found = advantages(config, [Group(one.request, tuple(members))])
    assert [a for sample in found for a in sample] == pytest.approx([(x - mean) / deviation for x in tokens])


def test_the_deviation_may_be_left_out() -> None:
    found = advantages(DISConfig(std="none"), [group(0, [1.0, 0.0, 0.5])])
    assert [sample[0] for sample in found] == pytest.approx([0.5, -0.5, 0.0])


# ── overlong answers ────────────────────────────────────────────────────────────────────────────────────


def test_the_overlong_punishment_is_that_of_the_paper() -> None:
    """Eq. 13 with L_max 20, L_cache 5: 0 up to 15 tokens, then linear to -1 at 20 and beyond."""
    punishment = Overlong(OverlongConfig(max_tokens=20, buffer=5), max_new_tokens=None).punishment
    assert [punishment(n) for n in (0, 15, 16, 18, 20, 40)] == pytest.approx([0, 0, 0.2, 0.6, 1, 1])
    published = Overlong(OverlongConfig(max_tokens=20_480, weight=2.0), max_new_tokens=7).punishment
    assert [published(n) for n in (16_384, 18_432, 20_480)] == pytest.approx([0, 1, 2])


def test_dapo_punishes_length_before_the_group_is_compared() -> None:
    rewards, lengths = [1.0, 1.0, 0.0, 0.0], [10, 19, 12, 20]
    lost = [0.0, 0.8, 0.0, 1.0]  # the limit is 20, the buffer 5
    outcomes = [r - x for r, x in zip(rewards, lost, strict=True)]
    mean, deviation = statistics.fmean(outcomes), statistics.pstdev(outcomes)
    config = DAPOConfig(eps=0, overlong=OverlongConfig(buffer=5))
    found = advantages(config, [group(0, rewards, lengths)], max_new_tokens=20)
    assert [sample[0] for sample in found] == pytest.approx([(x - mean) / deviation for x in outcomes])
    plain = advantages(DAPOConfig(eps=0, overlong=OverlongConfig(weight=0)), [group(0, rewards, lengths)], 20)
    assert [sample[0] for sample in plain] == pytest.approx([1, 1, -1, -1])


def test_dynamic_sampling_judges_the_reward_and_not_the_length() -> None:
    """The two halves of DAPO together: a group that is all wrong is dropped, however long its answers are."""
    keep = make_filter(SpreadFilter())
    assert keep(group(0, [0.0, 0.0], [10, 20])).startswith("equal_rewards")
    assert keep(group(0, [0.0, None, 0.0], [10, 10, 20])).startswith("equal_rewards")
    assert keep(group(0, [1.0, 0.0], [10, 20])) == ""


def test_the_recipe_holds_all_four_parts_of_dapo() -> None:
    config = load_recipe(str(Path(__file__).parents[2] / "recipes" / "dapo.py"))
    assert isinstance(config.algorithm, DAPOConfig)
    assert (config.algorithm.clip_low, config.algorithm.clip_high) == (0.2, 0.28)
    assert config.algorithm.normaliser is Normaliser.TOKEN
    assert config.algorithm.overlong.buffer == 6
    assert config.data.filters == (SpreadFilter(),)


def test_any_method_may_punish_length() -> None:
    overlong = OverlongConfig(max_tokens=10, buffer=10)
    found = advantages(RLOOConfig(overlong=overlong), [group(0, [1.0, 0.0], [5, 10])])
    assert [sample[0] for sample in found] == pytest.approx([1.5, -1.5])
    groups = [group(0, [1.0, 0.0], [5, 10])]
    tokens = [0.5] * 5 + [-1.0] * 10
    mean, deviation = statistics.fmean(tokens), statistics.pstdev(tokens)
    for config in (ReinforcePPConfig(eps=0, overlong=overlong), ReinforcePPBaselineConfig(eps=0, overlong=overlong)):
        found = advantages(config, groups)
        assert [a for s in found for a in s] == pytest.approx([(x - mean) / deviation for x in tokens])


def test_a_length_that_cannot_be_is_told_at_start() -> None:
    with pytest.raises(ConfigError, match="no limit to be measured by"):
        make_algorithm(DAPOConfig())
    with pytest.raises(ConfigError, match="longer than the 20 tokens"):
        make_algorithm(DAPOConfig(overlong=OverlongConfig(buffer=21)), max_new_tokens=20)


# ── groups and tokens that teach nothing ────────────────────────────────────────────────────────────────

CREDITS = [
    GRPOConfig(eps=0),
    DAPOConfig(eps=0),
    GSPOConfig(eps=0),
    CISPOConfig(eps=0),
    IcePopGRPOConfig(eps=0),
    DecoupledConfig(eps=0),
    DISConfig(eps=0),
    DISConfig(std="none"),
    ReinforcePPBaselineConfig(eps=0),
]


@pytest.mark.parametrize("config", CREDITS)
@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [0.7], [None, 0.3], [None, None]])
def test_equal_or_single_members_get_exactly_nothing(config: AlgorithmConfig, rewards: list[float | None]) -> None:
    found = advantages(config, [group(0, rewards)])
    assert all(a == 0.0 for sample in found for a in sample)


@pytest.mark.parametrize("config", CREDITS)
def test_a_failure_of_the_infrastructure_is_in_no_statistic(config: AlgorithmConfig) -> None:
    with_failure = advantages(config, [group(0, [1.0, None, 0.0], [2, 3, 4])])
    without = advantages(config, [group(0, [1.0, 0.0], [2, 4])])
    assert with_failure == without


def test_stale_tokens_leave_the_loss_and_stay_in_the_statistics() -> None:
    one = group(0, [1.0, 0.0, 0.0], [2, 2, 2])
    gate = Gate(GateConfig(max_lag=1, on_stale=OnStale.MASK_TOKENS), groups_per_step=1)
    lags = {member.episode.id: lag for member, lag in zip(one.members, (0, 3, 0), strict=True)}
    members = [
        replace(m, samples=gate.judge(m.samples, lambda _, lag=lags[m.episode.id]: lag).samples) for m in one.members
    ]
    stale = members[1].samples[0]
    assert stale.num_trained_tokens == 0
    assert stale["lag"].tolist() == [-1, -1, 3, 3]
    assert members[0].samples[0]["lag"].tolist() == [-1, -1, 0, 0]
    for config in (GRPOConfig(), ReinforcePPBaselineConfig()):
        assert advantages(config, [Group(one.request, tuple(members))]) == advantages(config, [one])


def test_the_gate_writes_the_lag_of_each_token() -> None:
    (member,) = group(0, [1.0], [4]).members
    (sample,) = member.samples
    versions = sample["version"].copy()
    versions[-2:] = Version(2).code
    mixed = sample.with_streams(version=versions)
    judged = Gate(GateConfig(max_lag=5), groups_per_step=1).judge((mixed,), lambda version: 2 - version.step)
    assert judged.samples[0]["lag"].tolist() == [-1, -1, 2, 2, 0, 0]
    assert judged.lag == 2
