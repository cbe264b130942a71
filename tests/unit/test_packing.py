"""Packs hold every sample once, keep to the budget, and name what does not fit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_cases import make_samples

from sluice.errors import TrainError
from sluice.train.packing import assign, assign_groups, loss_scales, make_batch, pack, packing_efficiency
from sluice.types import Normaliser


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_assign_is_a_partition_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = assign(lengths, budget)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[index] for index in members) <= budget
        assert members == sorted(members)
    assert bins == assign(lengths, budget)
    # First fit: what opened a micro-batch had no room in an earlier one, so no two are half empty.
    loads = [sum(lengths[index] for index in members) for members in bins]
    assert all(a + b > budget for a, b in pairwise(loads))


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_assign_groups_is_a_partition_within_the_budget(lengths: list[int], budget: int) -> None:
    samples = make_samples(lengths)
    bins = assign_groups(samples, budget)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= budget for members in bins)
    assert all(members == sorted(members) for members in bins)
    assert len(bins) <= 1.25 * len(assign(lengths, budget))


def test_groups_stay_together() -> None:
    """Lengths of four groups of four are mixed, so that samples one by one would come apart."""
    lengths = [30, 4, 22, 11, 29, 5, 21, 12, 28, 6, 20, 13, 27, 7, 19, 14]
    bins = assign_groups(make_samples(lengths), 70)
    assert bins == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert assign(lengths, 70) != bins
    # In micro-batches of 40 tokens no group fits; parts of groups do, and nothing is lost.
    halves = assign_groups(make_samples(lengths), 40)
    assert sorted(index for members in halves for index in members) == list(range(16))


def test_groups_come_apart_where_they_would_cost_passes() -> None:
    lengths = [11, 10, 10, 10] * 3
    assert len(assign(lengths, 63)) == 2  # of 41 tokens a group, each would have a micro-batch of its own
    assert assign_groups(make_samples(lengths), 63) == assign(lengths, 63)


def test_scales_travel_with_their_samples() -> None:
    samples = make_samples([5, 9, 3, 20])
    batch = make_batch(samples, budget=20, normaliser=Normaliser.EPISODE)
    wanted = dict(zip([s.key for s in samples], loss_scales(samples, Normaliser.EPISODE), strict=True))
    for micro in batch.micro_batches:
        for sample, scales in zip(micro.samples, np.split(micro.scales, micro.cu_seqlens[1:-1]), strict=True):
            np.testing.assert_array_equal(scales, wanted[sample.key])


def test_efficiency() -> None:
    samples = make_samples([20, 12, 8, 7])
    scales = loss_scales(samples, Normaliser.TOKEN)
    assert packing_efficiency(pack(samples, budget=20, scales=scales), 20) == 1.0
    assert packing_efficiency(pack(samples, budget=24, scales=scales), 24) == 47 / (24 + 24 + 7)
    assert packing_efficiency((), 24) == 1.0


def test_too_long_and_empty_samples_are_named() -> None:
    samples = make_samples([5, 9])
    with pytest.raises(TrainError, match=r"segment 1 of episode e0 has 9 tokens.*\n.*train.micro_batch_tokens to 9"):
        make_batch(samples, budget=8, normaliser=Normaliser.TOKEN)
    empty = type(samples[0])("e9", "g", 0, samples[0].ids[:0], {n: v[:0] for n, v in samples[0].streams.items()})
    with pytest.raises(TrainError, match="e9 has no tokens"):
        make_batch([empty], budget=8, normaliser=Normaliser.TOKEN)
    assert make_batch([], budget=8, normaliser=Normaliser.TOKEN).micro_batches == ()
