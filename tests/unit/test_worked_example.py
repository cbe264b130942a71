"""One episode through all types, with the numbers worked out by hand in docs/worked-example.md."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import worked

from sluice.algos import make_algorithm
from sluice.algos.corrections import tis_weight
from sluice.config.algos import DrGRPOConfig, GRPOConfig, RLOOConfig
from sluice.config.data import GateConfig, OnStale
from sluice.data.gate import Gate
from sluice.log.lineage import account
from sluice.log.reader import LogReader
from sluice.log.records import Disposition, DispositionRecord, Entry, EpisodeRecord, ResumeRecord, RewardRecord
from sluice.log.writer import LogWriter
from sluice.train.packing import loss_scales, make_batch
from sluice.types import Group, Normaliser, TrainSample, Version
from sluice.weights.lineage import Born, Lineage


def lineage() -> Lineage:
    steps = [Born(Version(s), Version(s - 1) if s else None, f"c{s}") for s in range(6)]
    line = Lineage(steps)
    line.current = worked.V5
    return line


def judged(group: Group, on_stale: OnStale) -> tuple[Group, list[int]]:
    gate = Gate(GateConfig(max_lag=1, on_stale=on_stale), groups_per_step=1)
    members, masked = [], []
    for member in group.members:
        if member.reward is None:
            members.append(member)
            continue
        verdict = gate.judge(member.samples, lineage().lag)
        masked.append(verdict.masked_tokens)
        members.append(replace(member, samples=verdict.samples))
    return replace(group, members=tuple(members)), masked


def with_advantages(group: Group) -> list[TrainSample]:
    advantages = make_algorithm(GRPOConfig(eps=0.0)).credit([group])
    return [s.with_streams(advantage=advantages[s.key]) for member in group.valid for s in member.samples]


def loss(samples: list[TrainSample], normaliser: Normaliser, constant: float = 1.0) -> float:
    scales = loss_scales(samples, normaliser, constant=constant)
    return sum(float((scale * -s["advantage"]).sum()) for s, scale in zip(samples, scales, strict=True))


def test_the_reward_is_the_weighted_sum_of_its_components() -> None:
    first, second = worked.rewards()
    assert (first.total, second.total) == (1.0, 0.0)


def test_segments_share_context_and_train_every_sampled_token_once() -> None:
    group = worked.group()
    s0, s1 = group.members[0].samples
    assert [len(s0), len(s1)] == [12, 13]
    assert s1.ids.tolist() == [1, 10, 11, 12, 20, 21, 22, 2, 40, 41, 24, 25, 2]
    assert np.flatnonzero(s0["weight"]).tolist() == [4, 5, 6, 7, 10, 11]
    assert np.flatnonzero(s1["weight"]).tolist() == [10, 11, 12]
    trained = [s.num_trained_tokens for member in group.valid for s in member.samples]
    assert trained == [6, 3, 3]
    assert sum(trained) == 12
    assert s0["behaviour"][[4, 5, 6, 7, 10, 11]].tolist() == [-0.5, -1.0, -0.25, -0.125, -0.75, -0.0625]
    versions = [str(Version.from_code(code)) for code in s0["version"][[4, 5, 6, 7, 10, 11]]]
    assert versions == ["3.0", "3.0", "4.0", "4.0", "4.0", "4.0"]
    assert set(s0["temperature"][s0.trained].tolist()) == {np.float32(0.8)}


def test_lag_is_that_of_the_oldest_token() -> None:
    gate = Gate(GateConfig(max_lag=2), groups_per_step=1)
    first, second = (gate.judge(member.samples, lineage().lag) for member in worked.group().valid)
    assert (first.lag, second.lag) == (2, 0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GRPOConfig(eps=0.0), 1.0),
        (GRPOConfig(eps=0.0, std="sample"), 0.70710678),
        (DrGRPOConfig(constant=16), 0.5),
        (RLOOConfig(), 1.0),
    ],
    ids=["grpo", "grpo-sample-std", "dr_grpo", "rloo"],
)
def test_advantages_compare_the_two_valid_episodes(config: GRPOConfig, expected: float) -> None:
    group = worked.group()
    assert group.rewards.tolist() == [1.0, 0.0]
    assert (group.rewards.mean(), group.rewards.std()) == (0.5, 0.5)
    advantages = make_algorithm(config).credit([group])
    for member, sign in zip(group.valid, (1, -1), strict=True):
        for sample in member.samples:
            assert advantages[sample.key][sample.trained] == pytest.approx(sign * expected, abs=1e-8)
            assert not advantages[sample.key][~sample.trained].any()
    assert {key[0] for key in advantages} == {"g000000.0", "g000000.1"}, "the failed episode has no advantage"


def test_masking_takes_stale_tokens_out_of_the_loss_but_not_out_of_the_statistics() -> None:
    group, masked = judged(worked.group(), OnStale.MASK_TOKENS)
    samples = with_advantages(group)
    assert masked == [2, 0]
    assert sum(s.num_trained_tokens for s in samples) == 10
    assert [s["advantage"][s.trained][0] for s in samples] == [1.0, 1.0, -1.0]


def test_dropping_takes_the_episode_out_of_the_loss_but_not_out_of_the_statistics() -> None:
    group, masked = judged(worked.group(), OnStale.DROP)
    samples = with_advantages(group)
    assert masked == [9, 0]
    assert [s.num_trained_tokens for s in samples] == [0, 0, 3]
    assert samples[2]["advantage"][samples[2].trained].tolist() == [-1.0] * 3


def test_packing_wastes_nothing_and_restarts_positions() -> None:
    samples = with_advantages(worked.group())
    batch = make_batch(samples, budget=32, normaliser=Normaliser.TOKEN)
    (micro,) = batch.micro_batches
    assert sorted(micro.lengths) == [7, 12, 13]
    ends = np.cumsum([len(s) for s in micro.samples])
    assert micro.cu_seqlens.tolist() == [0, *ends.tolist()]
    assert micro.positions.tolist() == [p for length in micro.lengths for p in range(length)]
    assert micro.num_tokens == 32


@pytest.mark.parametrize(
    ("normaliser", "constant", "expected"),
    [
        (Normaliser.TOKEN, 1.0, -0.5),
        (Normaliser.SEQUENCE, 1.0, -1 / 3),
        (Normaliser.EPISODE, 1.0, 0.0),
        (Normaliser.CONSTANT, 16.0, -0.125),
    ],
)
def test_loss_on_policy(normaliser: Normaliser, constant: float, expected: float) -> None:
    samples = with_advantages(worked.group())
    assert loss(samples, normaliser, constant) == pytest.approx(expected, abs=1e-12)
    for budget in (13, 20, 25, 32):
        batch = make_batch(samples, budget=budget, normaliser=normaliser, constant=constant)
        split = sum(float((m.scales * -m.stream("advantage")).sum()) for m in batch.micro_batches)
        assert split == pytest.approx(expected, abs=1e-12), f"micro-batches of {budget} tokens change the loss"


def test_loss_with_the_stale_tokens_masked() -> None:
    group, _ = judged(worked.group(), OnStale.MASK_TOKENS)
    assert loss(with_advantages(group), Normaliser.TOKEN) == pytest.approx(-0.4, abs=1e-12)


def test_truncated_importance_weight_leaves_the_behaviour_stream_alone() -> None:
    s0 = worked.group().members[0].samples[0]
    proximal = s0["behaviour"].copy()
    proximal[5] = -1.1
    scored = s0.with_streams(proximal=proximal)
    weight = tis_weight(torch.from_numpy(scored["proximal"]), torch.from_numpy(scored["behaviour"]), 2.0)
    assert weight[5].item() == pytest.approx(0.904837, abs=1e-6)
    assert scored["behaviour"][5] == -1.0


def test_the_log_holds_it_in_order_and_gives_it_back(tmp_path) -> None:
    e1, e2, e3 = worked.episodes()
    r1, r2 = worked.rewards()
    with LogWriter(tmp_path) as writer:
        for record in (
            EpisodeRecord(e1),
            RewardRecord(e1.id, r1),
            EpisodeRecord(e2),
            RewardRecord(e2.id, r2),
        ):
            writer.append(record)
        writer.append(EpisodeRecord(e3))
        writer.append(DispositionRecord(e1.id, e1.group_id, Disposition.TRAINED, step=6))
        writer.append(DispositionRecord(e2.id, e2.group_id, Disposition.TRAINED, step=6))
        writer.append(DispositionRecord(e3.id, e3.group_id, Disposition.EXCLUDED, reason="infra_failure"))
    records = [entry.record for entry in LogReader(tmp_path).read()]
    kinds = [type(record).__name__ for record in records]
    assert kinds == ["EpisodeRecord", "RewardRecord"] * 2 + ["EpisodeRecord"] + ["DispositionRecord"] * 3
    again = records[0].episode
    assert again.segments[1].fork == (0, 8, "sub_agent")
    for before, after in zip(e1.sampled_turns(), again.sampled_turns(), strict=True):
        assert after.ids.tolist() == before.ids.tolist()
        assert after.logprobs.tolist() == before.logprobs.tolist()
        assert (after.spans, after.sampling) == (before.spans, before.sampling)
    assert [record.disposition for record in records[5:]] == ["trained", "trained", "excluded"]


@pytest.mark.parametrize(("checksum", "expected"), [("c6", Version(6, 0)), ("other", Version(6, 1))])
def test_a_step_that_is_trained_again_keeps_its_name_only_with_the_same_bits(checksum: str, expected: Version) -> None:
    line = lineage()
    assert line.name(6, worked.V5, "c6") == Version(6)
    assert line.name(7, Version(6), "c7") == Version(7)
    line.current = worked.V5  # killed, resumed from the checkpoint of step 5
    assert line.name(6, worked.V5, checksum) == expected
    assert line.in_line(worked.V5)
    assert line.in_line(Version(6, 0)) == (expected == Version(6, 0))
    assert not line.in_line(Version(7, 0)), "an engine on (7,0) gets no traffic until it is synced"


def test_an_abandoned_lineage_does_not_count_as_trained() -> None:
    e1 = worked.episodes()[0]
    trained = DispositionRecord(e1.id, e1.group_id, Disposition.TRAINED, step=6)
    records = [EpisodeRecord(e1), trained, ResumeRecord(5, 0), trained]
    entries = [Entry(seq, 0.0, record) for seq, record in enumerate(records, start=1)]
    assert account(entries).complete
    assert account(entries).trained_at(6) == (e1.id,)
    assert account(entries[:3]).undecided == (e1.id,)
