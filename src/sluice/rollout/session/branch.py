"""The tokens of a session: segments that only grow, and forks of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sluice.rollout.session.history import Print
from sluice.types import Episode, Fork, Ids, Outcome, Prompt, Segment, Turn, observed


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A sampled turn in its place: positions `[begin, end)` of the segment.

    Attributes:
        settings: what the template was told when its opening was rendered.
        dropped: of a raw completion: what a client's stop string cut off its text.
    """

    begin: int
    turn: Turn
    settings: str = ""
    dropped: str = ""

    @property
    def end(self) -> int:
        return self.begin + len(self.turn)


class Entry(NamedTuple):
    """A recorded message, and the turn that it is when the model wrote it here."""

    print: Print
    answer: Answer | None = None


@dataclass(slots=True, eq=False)
class Branch:
    """One segment as it grows.

    `entries` is the history from the conversation's first message on, the shared part too; `turns` are its own.
    A branch always ends with an answer.
    """

    index: int
    head: str
    fork: Fork | None = None
    parent: Branch | None = None
    entries: list[Entry] = field(default_factory=list[Entry])
    turns: list[Turn] = field(default_factory=list[Turn])
    length: int = 0

    @property
    def prints(self) -> list[Print]:
        return [entry.print for entry in self.entries]

    def ids(self, end: int) -> Ids:
        """Its first `end` tokens, shape `[end]`."""
        parts: list[Ids] = []
        branch: Branch | None = self
        while branch is not None and end > 0:
            at = branch.length
            for turn in reversed(branch.turns):
                at -= len(turn)
                if at < end:
                    parts.append(turn.ids[: end - at])
            end = min(end, branch.fork.position if branch.fork else 0)
            branch = branch.parent
        return np.concatenate(parts[::-1]) if parts else np.empty(0, np.int32)

    def add(self, turn: Turn) -> None:
        if len(turn) or turn.finish:
            self.turns.append(turn)
            self.length += len(turn)

    def routes_end(self, entries: int) -> int:
        """The first position whose experts none of the answers among the first `entries` messages brought."""
        answers = (entry.answer for entry in reversed(self.entries[:entries]))
        return next((a.turn.routes.end for a in answers if a is not None and a.turn.routes is not None), 0)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Where a request goes on, before it is answered.

    Attributes:
        head: what the conversation begins with besides messages: its tools.
        prints: the whole history.
        settings: what the template was told.
        base: the branch that it goes on from; None: from nothing.
        position, kept: tokens and messages of `base` that it shares.
        observed: the tokens that come new before the answer.
        context: all tokens before the answer.
        deviation: empty for a history that goes on where a branch ends.
        reason: of the fork that it needs, if it needs one.
    """

    head: str
    prints: tuple[Print, ...]
    settings: str
    base: Branch | None
    position: int
    kept: int
    observed: Ids
    context: Ids
    deviation: str = ""
    reason: str = ""


class Tree:
    """All branches of a session. A branch's index is that of its segment."""

    def __init__(self) -> None:
        self.branches: list[Branch] = []

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.branches)

    def __len__(self) -> int:
        return len(self.branches)

    def record(self, plan: Plan, answers: Sequence[tuple[Print, Answer]]) -> list[Branch]:
        """Add a request with its answers; returns the branch of each. The second and later ones are forks.

        The branch may have grown since the plan was made, or the segment that the plan wanted to fork from may
        never have come to be: what is recorded is what is needed now.
        """
        first = self._settle(plan)
        branches = [first] + [self._fork(first, len(plan.context), "n", len(plan.prints)) for _ in answers[1:]]
        for branch, (print, answer) in zip(branches, answers, strict=True):
            branch.add(answer.turn)
            branch.entries.append(Entry(print, answer))
        return branches

    def _settle(self, plan: Plan) -> Branch:
        base = plan.base
        if base is None and not self.branches:
            branch = Branch(0, plan.head)
            self.branches.append(branch)
        elif base is not None and plan.position == base.length and plan.kept == len(base.entries):
            branch = base
        elif (twin := self._twin(plan)) is not None:
            return self._fork(twin, len(plan.context), plan.reason or "branch", len(plan.prints))
        else:
            parent = base or self.branches[0]
            branch = self._fork(parent, plan.position, plan.reason or "branch", plan.kept, plan.head)
        branch.add(observed(plan.observed))
        branch.entries += [Entry(print) for print in plan.prints[plan.kept :]]
        return branch

    def _twin(self, plan: Plan) -> Branch | None:
        """A branch with an answer to exactly these tokens."""
        place, length = len(plan.prints), len(plan.context)
        for branch in self.branches:
            answer = branch.entries[place].answer if len(branch.entries) > place else None
            if answer is None or answer.begin != length or branch.head != plan.head:
                continue
            if np.array_equal(branch.ids(length), plan.context):
                return branch
        return None

    def _fork(self, parent: Branch, position: int, reason: str, kept: int, head: str | None = None) -> Branch:
        entries = parent.entries[:kept]
        head = parent.head if head is None else head
        while parent.fork is not None and parent.parent is not None and position <= parent.fork.position:
            parent = parent.parent  # the one that owns the last shared token
        fork = Fork(parent.index, position, reason)
        branch = Branch(len(self.branches), head, fork, parent, entries, length=position)
        self.branches.append(branch)
        return branch

    def episode(
        self,
        id: str,
        group_id: str,
        prompt: Prompt,
        outcome: Outcome,
        *,
        reason: str = "",
        policy: str = "actor",
        info: Mapping[str, Any],
    ) -> Episode:
        """What was recorded, as it goes into the log."""
        segments = tuple(Segment(tuple(branch.turns), branch.fork) for branch in self.branches)
        return Episode(id, group_id, prompt, segments, outcome, reason, policy, info)
