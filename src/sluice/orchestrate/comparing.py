"""Groups whose members are rewarded against each other: each waits until the last one is finished."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from sluice.types import Episode, Outcome, Reward


@dataclass(frozen=True, slots=True)
class Member:
    """A finished episode of a group that is compared.

    Attributes:
        reward: of the components that look at it alone, or the whole of it; None when its outcome does not count.
        whole: whether the reward holds the comparison too: one found in the log of an interrupted run does.
    """

    episode: Episode
    reward: Reward | None
    whole: bool = False


Compare = Callable[[Sequence[Member]], Awaitable[Sequence[Member]]]
"""The members that count, with their whole rewards; as infra failures when they cannot be compared."""


class Table:
    """Where the members of one group meet. The last to arrive has them compared; then all go on.

    Waits for: the group's other episodes. Unblocked by: the last of them. If one of them fails with an error, that
    error ends the run, and whoever waits here is cancelled.

    Args:
        size: members that will come.
        compare: called once, with those whose outcome counts.
    """

    def __init__(self, size: int, compare: Compare) -> None:
        self._size = size
        self._compare = compare
        self._members: dict[str, Member] = {}
        self._done = asyncio.Event()

    async def join(self, member: Member) -> Member:
        """Sit down; returns the member with its whole reward."""
        self._members[member.episode.id] = member
        if len(self._members) < self._size:
            await self._done.wait()  # its deadline is that of `Producer.next`
        else:
            counted = [each for each in self._members.values() if each.episode.outcome.counts]
            if not all(each.whole for each in counted):
                self._members |= {each.episode.id: each for each in await self._compare(counted)}
            self._done.set()
        return self._members[member.episode.id]


def failed(episode: Episode, reason: str) -> Episode:
    """The episode as one that could not be rewarded: an infra failure, never a reward of 0."""
    info = {**episode.info, "failed_in": "reward"}
    return replace(episode, outcome=Outcome.INFRA_FAILURE, reason=reason, info=info)
