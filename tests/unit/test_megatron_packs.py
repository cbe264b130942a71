"""How a micro-batch is padded and cut for Megatron's ranks: together they have every scored token once, in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.unit.train_cases import make_samples
from torch import Tensor
from torch.nn.functional import pad as right

from sluice.errors import TrainError
from sluice.train.backends.megatron.packs import Grid, Packed, make_packed, pad
from sluice.types import MicroBatch

CPU = torch.device("cpu")
NOTHING = 7
"""The id of padding, as it were; samples have it, too."""


def positions(at: Tensor) -> tuple[Tensor, Tensor]:
    """In place of angles, so that they can be read off."""
    return at, at


def micro_of(lengths: list[int]) -> MicroBatch:
    samples = tuple(make_samples(lengths, seed=len(lengths)))
    return MicroBatch(samples, np.zeros(sum(lengths)))


def scored_of(lengths: list[int], seed: int) -> NDArray[np.bool_]:
    """A random half of what something predicts."""
    chosen = np.random.default_rng(seed).random(sum(lengths)) < 0.5
    chosen[np.cumsum([0, *lengths])[:-1]] = False
    return chosen


def every(lengths: list[int], scored: NDArray[np.bool_], cp: int, by: int) -> list[list[Packed]]:
    """By context-parallel rank, then by rank that divides its tokens."""
    micro = micro_of(lengths) if lengths else MicroBatch((), np.zeros(0))
    return [
        [make_packed(micro, scored, Grid(cp, c, by, t), positions, CPU, padding_id=NOTHING) for t in range(by)]  # pyright: ignore
        for c in range(cp)
    ]


packs = st.fixed_dictionaries({
    "lengths": st.lists(st.integers(1, 40), max_size=6),
    "seed": st.integers(0, 5),
    "cp": st.sampled_from([1, 2, 3, 4]),
    "by": st.sampled_from([1, 2, 3, 4]),
})  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(packs)
def test_ranks_together_have_every_scored_token_once_and_in_order(drawn: dict[str, Any]) -> None:
    lengths, cp, by = drawn["lengths"], drawn["cp"], drawn["by"]
    scored = scored_of(lengths, drawn["seed"])
    found = every(lengths, scored, cp, by)
    ids = micro_of(lengths).ids if lengths else np.zeros(0, np.int64)
    first = [row[0] for row in found]
    most = max(first[0].counts)
    assert first[0].counts == tuple(len(pack.targets) for pack in first)
    assert first[0].index.tolist() == np.flatnonzero(scored).tolist()
    joined = torch.cat([right(pack.targets, (0, most - len(pack.targets)), value=-1) for pack in first])
    for pack in (each for row in found for each in row):
        assert joined[pack.order].tolist() == ids[scored].tolist()
        assert pack.counts == first[0].counts
        assert pack.rows.shape == pack.targets.shape == pack.temperature.shape
    if lengths:
        temperatures = torch.cat([right(pack.temperature, (0, most - len(pack.targets))) for pack in first])
        wanted = micro_of(lengths).stream("temperature")[scored]
        np.testing.assert_array_equal(temperatures[first[0].order].numpy(), wanted)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(packs)
def test_a_row_is_what_predicts_and_stands_where_it_did(drawn: dict[str, Any]) -> None:
    lengths, cp, by = drawn["lengths"], drawn["cp"], drawn["by"]
    scored = scored_of(lengths, drawn["seed"])
    ids = micro_of(lengths).ids if lengths else np.zeros(0, np.int64)
    place = np.concatenate([np.zeros(0, np.int64), *(np.arange(length) for length in lengths)])
    joined_ids: list[Tensor] = []
    joined_places: list[Tensor] = []
    found = [row[0] for row in every(lengths, scored, cp, by)]
    most = max(found[0].counts)
    for pack in found:
        joined_ids.append(right(pack.ids[0][pack.rows], (0, most - len(pack.rows))))
        joined_places.append(right(pack.cos[pack.rows], (0, most - len(pack.rows))))
    at = np.flatnonzero(scored)
    assert torch.cat(joined_ids)[found[0].order].tolist() == ids[at - 1].tolist()
    assert torch.cat(joined_places)[found[0].order].tolist() == (place[at] - 1).tolist()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(packs)
def test_ranks_have_as_many_tokens_and_as_much_to_attend_to(drawn: dict[str, Any]) -> None:
    lengths, cp, by = drawn["lengths"], drawn["cp"], drawn["by"]
    padded = pad(lengths, Grid(cp, 0, by, 0))
    assert padded.owned.shape[0] == cp
    assert sorted(padded.owned.reshape(-1)) == list(range(sum(padded.lengths)))
    assert padded.owned.shape[1] % by == 0
    assert len(set(padded.positions[padded.owned].sum(axis=1).tolist())) == 1
    for length, given_length in zip(padded.lengths, lengths, strict=False):
        assert 0 <= length - given_length < max(2 * cp, 2)
        assert cp == 1 or length % (2 * cp) == 0
    assert len(padded.lengths) - len(lengths) in (0, 1)
    assert sum(padded.lengths) - sum(lengths) < 2 * cp * (len(lengths) + 1) * by + 2


@pytest.mark.parametrize("cp", [1, 2])
def test_padding_gets_no_gradient_and_parts_of_a_sequence_say_so_for_their_own(cp: int) -> None:
    lengths = [5, 9]
    scored = scored_of(lengths, 0)
    micro = micro_of(lengths)
    micro.samples[1].ids[3] = NOTHING
    halves = [
        make_packed(micro, scored, Grid(cp, cp - 1, 2, t), positions, CPU, padding_id=NOTHING)  # pyright: ignore
        for t in range(2)
    ]
    size = halves[0].ids.shape[1] // 2
    masks = [torch.zeros(size, 1, 1, dtype=torch.bool) if half.still is None else half.still for half in halves]
    assert torch.cat(masks).flatten().tolist() == (halves[0].ids[0] == NOTHING).tolist()
    none = make_packed(micro, scored, Grid(), positions, CPU)  # pyright: ignore
    assert none.still is None


def test_chunks_of_two_ranks() -> None:
    padded = pad([6, 3], Grid(2, 0, 1, 0))
    assert padded.lengths == (8, 4)
    assert padded.owned.tolist() == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    assert padded.at.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]


def test_an_empty_pass_is_padding_that_every_rank_can_run() -> None:
    for cp, by, tokens in ((1, 1, 2), (2, 1, 4), (2, 2, 4), (1, 4, 4), (2, 4, 8)):
        (pack,) = every([], np.zeros(0, bool), cp, by)[cp - 1][:1]
        assert pack.lengths == (tokens,)
        assert pack.ids.shape == (1, tokens // cp)
        assert (len(pack.rows), len(pack.index), set(pack.counts)) == (0, 0, {0})


def test_a_first_token_cannot_be_scored() -> None:
    scored = np.zeros(9, bool)
    scored[4] = True
    with pytest.raises(TrainError, match="predict"):
        make_packed(micro_of([4, 5]), scored, Grid(2), positions, CPU)  # pyright: ignore
