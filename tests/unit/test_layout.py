"""Which ranks make a replica, who answers for it, how a batch is shared out over replicas."""

from __future__ import annotations

from typing import Any

import pytest

from sluice.config.train import TrainConfig
from sluice.train.layout import Layout, Place
from sluice.train.packing import spread


def megatron(ranks: int, **layout: Any) -> Layout:
    return Layout.of(TrainConfig.model_validate({"backend": "megatron", "ranks": ranks, "megatron": layout}))


def test_under_torch_every_rank_is_a_replica() -> None:
    layout = Layout.of(TrainConfig(ranks=3))
    assert layout.replicas == 3
    assert [layout.place(rank) for rank in range(3)] == [Place(0, 0, dp, 0) for dp in range(3)]
    assert layout.from_ranks(["a", "b", "c"]) == layout.to_ranks(["a", "b", "c"]) == ["a", "b", "c"]
    assert layout.passes_multiple == 1


def test_ranks_are_numbered_as_megatron_core_does() -> None:
    """tp 2 x cp 1 x dp 2 x pp 2: tp changes fastest, then dp, then pp."""
    layout = megatron(8, tp=2, pp=2)
    assert layout.replicas == 2
    places = [(p.tp, p.cp, p.dp, p.pp) for p in map(layout.place, range(8))]
    assert places == [
        (0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (1, 0, 1, 0),
        (0, 0, 0, 1), (1, 0, 0, 1), (0, 0, 1, 1), (1, 0, 1, 1),
    ]  # fmt: skip
    assert layout.members(0) == (0, 1, 4, 5)
    assert layout.members(1) == (2, 3, 6, 7)
    assert [layout.speaker(0), layout.speaker(1)] == [4, 6]
    assert layout.to_ranks(["x", "y"]) == ["x", "x", "y", "y", "x", "x", "y", "y"]
    assert layout.from_ranks(range(8)) == [4, 6]


def test_context_lies_between_tensors_and_replicas() -> None:
    layout = megatron(12, tp=2, cp=3)
    assert layout.place(5) == Place(tp=1, cp=2, dp=0, pp=0)
    assert layout.place(6) == Place(tp=0, cp=0, dp=1, pp=0)
    assert layout.members(1) == (6, 7, 8, 9, 10, 11)
    assert layout.speaker(1) == 6
    assert all(layout.rank(layout.place(rank)) == rank for rank in range(12))


def test_the_order_is_megatron_cores_own() -> None:
    """Against the groups that its `RankGenerator` makes."""
    from megatron.core.parallel_state import RankGenerator

    layout = Layout(48, tp=2, cp=3, pp=4)
    theirs = RankGenerator(tp=2, ep=1, dp=2, pp=4, cp=3, order="tp-cp-ep-dp-pp")
    for axis in ("tp", "cp", "dp", "pp"):
        others = [name for name in ("tp", "cp", "dp", "pp") if name != axis]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(48):
            place = layout.place(rank)
            groups.setdefault(tuple(getattr(place, name) for name in others), []).append(rank)
        assert sorted(groups.values()) == sorted(theirs.get_ranks(axis))


@pytest.mark.parametrize(("pp", "vpp", "expected"), [(1, 1, 1), (4, 1, 1), (4, 2, 4)])
def test_interleaved_stages_take_passes_in_groups(pp: int, vpp: int, expected: int) -> None:
    assert megatron(4, pp=pp, vpp=vpp).passes_multiple == expected


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_every_replica_makes_a_multiple_of_passes(multiple: int, alone: bool) -> None:
    lengths = [9, 4, 4, 7, 1, 8, 3]
    shares = spread(lengths, 2, 10, alone=alone, multiple=multiple)
    passes = {len(share) for share in shares}
    assert len(passes) == 1
    assert passes.pop() % multiple == 0
    assert sorted(index for share in shares for members in share for index in members) == list(range(7))
    assert all(sum(lengths[index] for index in members) <= 10 for share in shares for members in share)
    assert [len(share) for share in spread([], 2, 10, alone=alone, multiple=multiple)] == [multiple, multiple]
