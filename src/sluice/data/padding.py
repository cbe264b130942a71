"""Groups in which episodes failed: filled up with repeats of the valid ones, or dropped.

An algorithm that compares the members of a group leaves failed ones out, and the group then weighs less in its batch
than a whole one. GLM-5 (arXiv 2602.15763, asynchronous agent RL) gives it its weight back: of a group that is more than
half valid the valid members are repeated, and others are dropped. Both shift what is trained towards prompts and
lengths at which less fails, so how often is counted, by task too.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from sluice.data.filters import GroupFilter
from sluice.types import Group, Scored


def mostly_failed(min_share: float) -> GroupFilter:
    """Drop a group of which no more than `min_share` is valid."""

    def judge(group: Group) -> str:
        valid, whole = len(group.valid), len(group.members)
        return "" if valid > min_share * whole else f"mostly_failed: {valid} of {whole} valid"

    return judge


def pad(group: Group) -> Group:
    """The group with each failed member replaced by a repeat of a valid one, in turn, from the first on.

    A repeat is an episode of its own for statistics and normalisers: its id is that of the one it repeats, with `~1` or
    `~2` behind it. A group without failed members, or without valid ones, is returned as it is.
    """
    valid = group.valid
    if not valid or len(valid) == len(group.members):
        return group
    number = count()
    members = tuple(m if m.episode.outcome.counts else _repeat(valid, next(number)) for m in group.members)
    return replace(group, members=members)


def _repeat(valid: tuple[Scored, ...], number: int) -> Scored:
    member = valid[number % len(valid)]
    id = f"{member.episode.id}~{number // len(valid) + 1}"
    samples = tuple(replace(sample, episode_id=id) for sample in member.samples)
    return Scored(replace(member.episode, id=id), member.reward, samples)
