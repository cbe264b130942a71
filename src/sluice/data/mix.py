"""Several tasks in one run: each has its share of the groups and a cursor of its own, so that a small task goes
round while a large one has not been seen once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from sluice.data.strategy import Cursor
from sluice.errors import DataError
from sluice.types import Group, Prompt


class Turns:
    """Whose turn it is: shares hold from the first turn on, not only on average.

    After any n turns a task of share p has had n·p turns, give or take less than one, so in any window of turns
    it is off by less than two. That is Tijdeman's algorithm for the chairman assignment problem (1980), in exact
    fractions: among tasks that are behind by at least 1/(2k - 2), the one that must come next soonest.

    Args:
        weights: by task; any positive numbers.
        seed: decides between tasks that are equally due.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        total = sum(map(Fraction, weights.values()))
        self._shares = {name: Fraction(weight) / total for name, weight in weights.items()}
        self._order = sorted(weights)
        random.Random(f"{seed}/mix").shuffle(self._order)
        self.counts = dict.fromkeys(weights, 0)

    def next(self) -> str:
        """The task whose turn it is."""
        turn, k = sum(self.counts.values()) + 1, len(self._shares)
        slack = Fraction(1, 2 * k - 2) if k > 1 else Fraction(0)
        due = [name for name in self._order if turn * self._shares[name] - self.counts[name] >= slack]
        chosen = min(due, key=lambda name: (self.counts[name] + 1 - slack) / self._shares[name])
        self.counts[chosen] += 1
        return chosen


class MixStrategy:
    """Groups of several tasks by weight.

    Args:
        prompts: by task, none empty.
        weights: share of the groups, by task.
        samples: episodes of one prompt, by task.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        *,
        weights: Mapping[str, float],
        samples: Mapping[str, int],
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self._turns = Turns(weights, seed)
        self._samples = samples
        self._cursors = {name: Cursor(each, seed=f"{seed}/{name}", shuffle=shuffle) for name, each in prompts.items()}

    def next(self) -> tuple[Prompt, int]:
        """The next prompt of the task whose turn it is."""
        task = self._turns.next()
        return self._cursors[task].next(), self._samples[task]

    def observe(self, group: Group) -> None:
        """Nothing to learn from history."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "turns": dict(self._turns.counts),
            "cursors": {name: cursor.state_dict() for name, cursor in self._cursors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["turns"].keys() != self._cursors.keys():
            raise DataError(
                f"the checkpoint mixes {sorted(state['turns'])}, the recipe {sorted(self._cursors)}",
                hint="resume with the tasks the run was started with, or start a new run",
            )
        self._turns.counts = {name: int(count) for name, count in state["turns"].items()}
        for name, saved in state["cursors"].items():
            self._cursors[name].load_state_dict(saved)
