"""How a batch is shared out over ranks: by tokens, equally many passes, nothing lost, the budget kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.train_cases import make_samples

from sluice.train.packing import make_batch, split_over, spread
from sluice.types import Normaliser

lengths = st.lists(st.integers(1, 64), min_size=0, max_size=60)


@given(lengths, st.integers(1, 8), st.integers(64, 400))
@settings(max_examples=200, deadline=None)
def test_every_sample_once_in_equally_many_passes_within_the_budget(sizes: list[int], ranks: int, budget: int) -> None:
    shares = spread(sizes, ranks, budget)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert sorted(index for share in shares for members in share for index in members) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in members) <= budget for share in shares for members in share)
    assert all(members == sorted(members) for share in shares for members in share)


@given(st.lists(st.integers(1, 64), min_size=8, max_size=60), st.integers(2, 8))
@settings(max_examples=200, deadline=None)
def test_no_pass_is_heavier_than_graham_allows(sizes: list[int], ranks: int) -> None:
    """LPT: the heaviest pass is at most the mean and one longest sample. With room for all in one pass a rank."""
    shares = spread(sizes, ranks, sum(sizes))
    loads = [sum(sizes[index] for index in members) for share in shares for members in share]
    assert len(loads) == ranks
    assert max(loads) <= sum(sizes) / ranks + max(sizes)


def test_worked_by_hand() -> None:
    """9 7 6 5 4 2 over two ranks of 20: 9, 7 | 6 to the 7, 5 to the 9, then 14 and 13: 4 to the 13, 2 to the 14."""
    assert spread([4, 9, 2, 7, 6, 5], 2, 20) == [[[1, 2, 5]], [[0, 3, 4]]]


@given(lengths, st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_one_sample_a_pass(sizes: list[int], ranks: int) -> None:
    """For a model that cannot have more: as few passes as can be, and those that meet are of similar lengths."""
    shares = spread(sizes, ranks, 64, alone=True)
    assert {len(share) for share in shares} == {max(1, -(-len(sizes) // ranks))}
    assert sorted(index for share in shares for members in share for index in members) == list(range(len(sizes)))
    assert all(len(members) <= 1 for share in shares for members in share)
    rounds = [[sizes[index] for share in shares for index in share[number]] for number in range(len(shares[0]))]
    assert all(min(one) >= max(next_) for one, next_ in pairwise(rounds) if next_)


def test_one_sample_a_pass_by_hand() -> None:
    """9 and 7 meet; the 5 goes to the rank that had the 7."""
    assert spread([5, 9, 7], 2, 64, alone=True) == [[[1], []], [[2], [0]]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_loss_factors_stay_with_their_samples(ranks: int) -> None:
    samples = make_samples((5, 17, 9, 30, 12, 7, 3))
    batch = make_batch(samples, budget=40, normaliser=Normaliser.EPISODE)
    expected = {
        sample.key: part
        for micro in batch.micro_batches
        for sample, part in zip(micro.samples, np.split(micro.scales, micro.cu_seqlens[1:-1]), strict=True)
    }
    found = {
        sample.key: part
        for share in split_over(batch, ranks, 40)
        for micro in share
        for sample, part in zip(micro.samples, np.split(micro.scales, micro.cu_seqlens[1:-1]), strict=True)
    }
    assert found.keys() == expected.keys()
    for key, scale in expected.items():
        np.testing.assert_array_equal(found[key], scale)
