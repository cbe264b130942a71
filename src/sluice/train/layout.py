"""Which part of a model, and of a batch, each rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from sluice.config.train import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Coordinates of a rank, each from 0.

    Attributes:
        tp: its part of every matrix.
        cp: its part of the tokens of every sample.
        dp: the replica it belongs to.
        pp: its stage of the pipeline.
    """

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks in Megatron-Core's default order, `tp-cp-ep-dp-pp`: rank = tp + TP·(cp + CP·(dp + DP·pp)).

    A replica is `tp` x `cp` x `pp` ranks that hold one model between them and work on the same samples. Its speaker,
    which has the results, is the rank (tp 0, cp 0) of the last stage. Under the torch backend every rank is a replica
    of its own, whatever FSDP keeps where.

    Attributes:
        ranks: all of them, a multiple of tp · cp · pp.
        tp, cp, pp: ranks of a replica in each dimension.
        vpp: blocks of layers at each stage.
    """

    ranks: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1

    def __post_init__(self) -> None:
        size = self.tp * self.cp * self.pp
        if self.ranks % size:
            raise ValueError(f"{self.ranks} ranks cannot be divided into replicas of {size}")

    @classmethod
    def of(cls, config: TrainConfig, *, ranks: int | None = None) -> Self:
        """What a recipe asks for.

        Args:
            ranks: how many there are; None is `train.ranks`.
        """
        ranks = config.ranks if ranks is None else ranks
        if config.backend == "torch":
            return cls(ranks)
        chosen = config.megatron
        return cls(ranks, chosen.tp, chosen.cp, chosen.pp, chosen.vpp)

    @property
    def replicas(self) -> int:
        """How many; a batch is shared out over them."""
        return self.ranks // (self.tp * self.cp * self.pp)

    @property
    def passes_multiple(self) -> int:
        """Passes of a replica in a step are a multiple of it: stages that hold several blocks take passes in groups of
        `pp`, and Megatron-Core 0.16 refuses a last group that is smaller."""
        return self.pp if self.vpp > 1 else 1

    def place(self, rank: int) -> Place:
        """Of a rank, which is below `ranks`."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.replicas)
        return Place(tp, cp, dp, pp)

    def rank(self, place: Place) -> int:
        """Inverse of `place`."""
        return place.tp + self.tp * (place.cp + self.cp * (place.dp + self.replicas * place.pp))

    def members(self, replica: int) -> tuple[int, ...]:
        """Ranks of a replica, ascending."""
        return tuple(rank for rank in range(self.ranks) if self.place(rank).dp == replica)

    def speaker(self, replica: int) -> int:
        """The rank that answers for a replica."""
        return self.rank(Place(tp=0, cp=0, dp=replica, pp=self.pp - 1))

    def to_ranks(self, shares: Sequence[T]) -> list[T]:
        """What each rank gets of one share for each replica."""
        return [shares[self.place(rank).dp] for rank in range(self.ranks)]

    def from_ranks(self, answers: Sequence[T]) -> list[T]:
        """What the replicas' speakers say, of the answers of all ranks."""
        return [answers[self.speaker(replica)] for replica in range(self.replicas)]
