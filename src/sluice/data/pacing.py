"""Pacing of admission: how many more groups may be dispatched now, computed from what is alive and nothing else.

A credit is the right to dispatch one group. A group takes a credit when it is requested and gives it back
when it is trained or dropped; the groups of the batch in training keep theirs until its step is done.
Credits are not counted up and down: they are computed anew at each use from the number of groups alive, so
a crash, a resume, or a drop between two uses cannot make them drift.

With `max_lag` L in optimizer steps, U updates a batch and G groups a batch, the limit is (⌊L/U⌋ + 1) · G.
Proof of the bound in dispatch order: a group dispatched under version v has at most ⌊L/U⌋ · G + G - 1 alive
groups before it, which is at most ⌊L/U⌋ whole batches, of U updates each; its lag is at most ⌊L/U⌋ · U ≤ L.
For L < U the limit is one batch: generation then never overlaps training, as at `max_lag` 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from sluice.errors import DataError


@dataclass(frozen=True, slots=True)
class Pacing:
    """See the module.

    Attributes:
        max_lag: the bound, in optimizer steps.
        groups_per_step: groups of one batch.
        updates: optimizer steps of one batch.
        extra: groups of over-sampling, in completion order only: the proof does not hold with them.
    """

    max_lag: int
    groups_per_step: int
    updates: int = 1
    extra: int = 0

    def __post_init__(self) -> None:
        if self.max_lag < 0 or self.groups_per_step < 1 or self.updates < 1:
            raise DataError(
                f"no pacing for max_lag = {self.max_lag}, groups_per_step = {self.groups_per_step}, "
                f"updates = {self.updates}",
                hint="max_lag must be at least 0, the other two at least 1",
            )

    @property
    def batches_ahead(self) -> int:
        """Whole batches that may be trained between the dispatch of a group and its own batch."""
        return self.max_lag // self.updates

    @property
    def limit(self) -> int:
        """Groups that may be alive at once, those of the batch in training included."""
        return (self.batches_ahead + 1) * self.groups_per_step + self.extra

    def credits(self, alive: int) -> int:
        """Groups that may be dispatched now.

        Args:
            alive: groups requested and neither trained nor dropped. It may exceed the limit, after a resume
                with a smaller `max_lag`: nothing is dispatched then until the surplus is trained.

        Raises:
            DataError: a negative number of groups is alive.
        """
        if alive < 0:
            raise DataError(f"{alive} groups are alive: a group was freed twice")
        return max(0, self.limit - alive)
