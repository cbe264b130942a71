"""The buffer: slots for groups, their lifecycle, and the order in which they are released to training.

    requested ──► complete ──► settled ──► taken ──► trained
                                  └──► dropped (filter), slot freed, refilled

A pure state machine: it neither waits nor logs nor generates. The loop asks `want()`, dispatches what
`request()` returns, brings finished episodes to `add()`, and takes a batch when `ready()`.

In dispatch order groups are settled (filters asked, strategy told) strictly one after the other in the
order they were requested, so refills and curricula do not depend on which episode happens to finish
first: at lag 0 a run is reproducible. In completion order a group is settled when it is complete.

What an episode costs does not depend on how many groups are alive: with a thousand engines they are thousands.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sluice.config.data import Order
from sluice.data.filters import GroupFilter
from sluice.data.gate import Gate
from sluice.data.strategy import Strategy
from sluice.errors import DataError
from sluice.types import Group, GroupRequest, SamplingParams, Scored


class State(StrEnum):
    """Where a group is in its life; trained and dropped groups leave the buffer."""

    REQUESTED = "requested"
    COMPLETE = "complete"
    SETTLED = "settled"
    TAKEN = "taken"


@dataclass(slots=True)
class _Slot:
    request: GroupRequest
    state: State = State.REQUESTED
    finished: dict[str, Scored] = field(default_factory=dict[str, Scored])
    completed_at: int = -1

    def group(self) -> Group:
        ids = [self.request.episode_id(sample) for sample in range(self.request.n)]
        return Group(self.request, tuple(self.finished[id] for id in ids))


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group that a filter took out, and why."""

    group: Group
    reason: str


class Buffer:
    """Owns the groups that are alive. See the module for the lifecycle."""

    def __init__(
        self,
        gate: Gate,
        strategy: Strategy,
        *,
        sampling: SamplingParams,
        filters: Sequence[GroupFilter] = (),
    ) -> None:
        self._gate = gate
        self._strategy = strategy
        self._sampling = sampling
        self._filters = filters
        self._in_order = gate.config.effective_order is Order.DISPATCH
        self._slots: dict[str, _Slot] = {}
        self._turn: deque[_Slot] = deque()
        """Groups to be settled: those asked for, in dispatch order; else those complete."""
        self._settled: list[_Slot] = []
        """Groups that may be taken, in the order they are to be trained."""
        self._again: list[GroupRequest] = []
        self._next_ordinal = 0
        self._completed = 0
        self._dropped_in_a_row = 0
        self._bound = self._own_bound

    @property
    def _own_bound(self) -> int | None:
        """Steps of lag that no group of this gate exceeds when its turn comes; None when one may be overtaken."""
        pacing = self._gate.pacing
        return pacing.batches_ahead * pacing.updates if self._in_order else None

    @property
    def alive(self) -> int:
        """Groups requested and neither trained nor dropped."""
        return len(self._slots)

    def want(self) -> int:
        """How many groups may be requested now."""
        return self._gate.admits(self.alive)

    def request(self) -> GroupRequest:
        """Give the next group a slot: one that is asked for again, or the strategy's."""
        again = self._again.pop(0) if self._again else None
        prompt, n = (again.prompt, again.n) if again else self._strategy.next()
        request = GroupRequest(self._next_ordinal, prompt, n, self._sampling)
        self._next_ordinal += 1
        self._slots[request.id] = slot = _Slot(request)
        if self._in_order:
            self._turn.append(slot)
        return request

    def batches_before(self, request: GroupRequest) -> int:
        """Whole batches that are trained before the one a living group is in, at most. In dispatch order."""
        later = next(number for number, id in enumerate(reversed(self._slots)) if id == request.id)
        return (self.alive - 1 - later) // self._gate.groups_per_step

    def add(self, scored: Scored) -> list[Dropped]:
        """A finished episode. Returns the groups that were dropped as a consequence.

        Raises:
            DataError: the group is not alive, the episode is already there, or filters have dropped so many
                groups in a row that the run would never train.
        """
        slot = self._slots.get(scored.episode.group_id)
        if slot is None or scored.episode.id in slot.finished:
            raise DataError(f"episode {scored.episode.id} belongs to no group that waits for it")
        slot.finished[scored.episode.id] = scored
        if len(slot.finished) < slot.request.n:
            return []
        slot.state = State.COMPLETE
        slot.completed_at = self._completed
        self._completed += 1
        if not self._in_order:  # others are there after a resume in another order
            bisect.insort(self._turn, slot, key=lambda slot: slot.request.ordinal)
        return self._settle()

    def _settle(self) -> list[Dropped]:
        """Ask the filters about every complete group whose turn it is."""
        dropped: list[Dropped] = []
        while self._turn and self._turn[0].state is not State.REQUESTED:
            slot = self._turn.popleft()
            if slot.state is State.SETTLED:  # before a resume in another order
                self._release(slot)
                continue
            group = slot.group()
            self._strategy.observe(group)
            reason = next((reason for judge in self._filters if (reason := judge(group))), "")
            if not reason:
                slot.state = State.SETTLED
                self._release(slot)
                self._dropped_in_a_row = 0
                continue
            del self._slots[group.id]
            dropped.append(Dropped(group, reason))
            self._dropped_in_a_row += 1
        limit = self._gate.config.refill_limit * self._gate.groups_per_step
        if dropped and self._dropped_in_a_row > limit:
            raise DataError(
                f"filters dropped {self._dropped_in_a_row} groups in a row, the last because {dropped[-1].reason}",
                hint="the task may be too easy or too hard for dynamic sampling: look at `sluice episodes RUN`, "
                "change the task or data.filters, or raise data.gate.refill_limit",
            )
        return dropped

    def _release(self, slot: _Slot) -> None:
        """Put a settled group where it is to be trained."""
        if self._in_order:
            self._settled.append(slot)
        else:
            bisect.insort(self._settled, slot, key=lambda slot: slot.completed_at)

    def _index(self) -> None:
        """Work out anew whose turn it is, from the groups alive and their states."""
        alive = [slot for slot in self._slots.values() if slot.state is not State.TAKEN]
        self._turn.clear()
        self._settled.clear()
        for slot in alive:
            free = slot.state is State.SETTLED and not (self._in_order and self._turn)
            if free:
                self._release(slot)
            elif self._in_order or slot.state is State.COMPLETE:
                self._turn.append(slot)

    def ready(self) -> bool:
        """Whether a whole batch can be taken."""
        return len(self._settled) >= self._gate.groups_per_step

    def take(self) -> list[Group]:
        """The groups of the next batch. They keep their slots until `trained`."""
        if not self.ready():
            raise DataError("take() before ready(): no whole batch is settled")
        slots = self._settled[: self._gate.groups_per_step]
        del self._settled[: self._gate.groups_per_step]
        for slot in slots:
            slot.state = State.TAKEN
        return [slot.group() for slot in slots]

    def trained(self) -> None:
        """The batch that was taken is trained: free its slots."""
        self._slots = {id: slot for id, slot in self._slots.items() if slot.state is not State.TAKEN}

    def renew(self, too_old: Callable[[Scored], bool]) -> list[Scored]:
        """After a resume under a tighter bound: groups that could not be trained within it are asked for again.

        These are the groups with an episode that is `too_old`, and those beyond the next batch: they grow older
        until their turn comes. Under a bound that is no tighter, groups are kept as they are.

        Returns:
            Their finished episodes, which nobody will train.
        """
        own = self._own_bound
        tighter = own is not None and (self._bound is None or self._bound > own)
        limit = self._gate.groups_per_step if tighter else self._gate.max_alive
        left: list[Scored] = []
        kept = 0
        for id, slot in list(self._slots.items()):
            if kept < limit and not any(too_old(scored) for scored in slot.finished.values()):
                kept += 1
                continue
            del self._slots[id]
            self._again.append(slot.request)
            left += slot.finished.values()
        self._bound = own
        self._index()
        return left

    def unfinished(self) -> list[tuple[GroupRequest, list[int]]]:
        """Requests with the sample numbers that are still missing: what a resumed run dispatches again."""
        missing: list[tuple[GroupRequest, list[int]]] = []
        for slot in self._slots.values():
            ids = [slot.request.episode_id(sample) for sample in range(slot.request.n)]
            samples = [sample for sample, id in enumerate(ids) if id not in slot.finished]
            if samples:
                missing.append((slot.request, samples))
        return missing

    # ── checkpoint ──────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """Which groups are alive and which of their episodes are in, by id: both are in the log themselves."""
        return {
            "next_ordinal": self._next_ordinal,
            "completed": self._completed,
            "dropped_in_a_row": self._dropped_in_a_row,
            "bound": self._bound,
            "strategy": self._strategy.state_dict(),
            "again": [request.id for request in self._again],
            "slots": [
                {
                    "group": slot.request.id,
                    "ordinal": slot.request.ordinal,
                    "state": slot.state.value,
                    "finished": list(slot.finished),
                    "completed_at": slot.completed_at,
                }
                for slot in self._slots.values()
            ],
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        requests: Mapping[str, GroupRequest],
        episodes: Mapping[str, Scored],
    ) -> None:
        """Restore from a checkpoint and the log.

        Args:
            state: what `state_dict` returned.
            requests: the groups alive, and those to be asked for again, by id.
            episodes: their finished episodes, by id.

        Raises:
            DataError: the log lacks a group or an episode that the checkpoint counts on.
        """
        self._next_ordinal = int(state["next_ordinal"])
        self._completed = int(state["completed"])
        self._dropped_in_a_row = int(state["dropped_in_a_row"])
        self._strategy.load_state_dict(state["strategy"])
        self._again = [requests[id] for id in state.get("again", [])]
        own, saved = self._own_bound, state.get("bound", self._own_bound)
        self._bound = None if own is None or saved is None else max(own, saved)
        self._slots = {}
        for saved in state["slots"]:
            lost = [id for id in saved["finished"] if id not in episodes]
            if lost or saved["group"] not in requests:
                what = f"episode {lost[0]} as finished" if lost else f"group {saved['group']} as dispatched"
                raise DataError(
                    f"the checkpoint counts {what}, but the log does not have it",
                    hint="the run's log/ folder is incomplete: restore it, or resume from an older checkpoint",
                )
            self._slots[saved["group"]] = _Slot(
                requests[saved["group"]],
                State(saved["state"]),
                {id: episodes[id] for id in saved["finished"]},
                int(saved["completed_at"]),
            )
        self._index()
