"""Strategies: which prompt is asked for next, and how often. They see every settled group."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sluice.errors import DataError
from sluice.types import Group, Prompt, Stateful


class Strategy(Stateful, Protocol):
    """Prompts and history → group requests. Its state is JSON and goes into every checkpoint.

    At lag 0 `observe` is called in dispatch order and before any later `next` that could depend on it, so
    a strategy that draws only from its own seeded state makes a reproducible run.
    """

    def next(self) -> tuple[Prompt, int]:
        """The next prompt and the number of episodes wanted for it."""
        ...

    def observe(self, group: Group) -> None:
        """A group is complete; called once for each, dropped ones included."""
        ...


class Cursor:
    """Passes over a list of prompts, each pass in a new seeded order. The state is where it stands."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int | str, shuffle: bool) -> None:
        if not prompts:
            raise DataError("no prompts to train on", hint="check data.train and data.eval_prompts")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._pass = 0
        self._at = 0
        self._order: list[int] = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"{self._seed}/{self._pass}").shuffle(order)
        return order

    def next(self) -> Prompt:
        if self._at == len(self._order):
            self._pass += 1
            self._at = 0
            self._order = self._shuffled()
        self._at += 1
        return self._prompts[self._order[self._at - 1]]

    def state_dict(self) -> dict[str, Any]:
        return {"pass": self._pass, "at": self._at, "prompts": len(self._prompts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["prompts"] != len(self._prompts):
            raise DataError(
                f"the checkpoint's cursor runs over {state['prompts']} prompts, the source has {len(self._prompts)}",
                hint="resume with the data the run was started with, or start a new run",
            )
        self._pass, self._at = int(state["pass"]), int(state["at"])
        self._order = self._shuffled()


class GroupStrategy:
    """GRPO sampling: every prompt in turn, `samples` episodes each."""

    def __init__(self, prompts: Sequence[Prompt], *, samples: int, seed: int, shuffle: bool = True) -> None:
        self._cursor = Cursor(prompts, seed=seed, shuffle=shuffle)
        self._samples = samples

    def next(self) -> tuple[Prompt, int]:
        return self._cursor.next(), self._samples

    def observe(self, group: Group) -> None:
        """Nothing to learn from history."""

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self._cursor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._cursor.load_state_dict(state["cursor"])


class CurriculumStrategy:
    """Levels in order: the next opens when the mean reward of the newest one's last groups is high enough."""

    def __init__(
        self,
        levels: Sequence[Sequence[Prompt]],
        *,
        samples: int,
        seed: int,
        threshold: float,
        window: int,
        review: float,
        shuffle: bool = True,
    ) -> None:
        self._cursors = [
            Cursor(prompts, seed=seed + 7_919 * level, shuffle=shuffle) for level, prompts in enumerate(levels)
        ]
        self._level_of = {prompt.id: level for level, prompts in enumerate(levels) for prompt in prompts}
        self._samples, self._threshold, self._review = samples, threshold, review
        self._recent: deque[float] = deque(maxlen=window)
        self._seed = seed
        self._drawn = 0
        self.level = 0

    def next(self) -> tuple[Prompt, int]:
        draw = random.Random(f"{self._seed}/curriculum/{self._drawn}")
        self._drawn += 1
        level = self.level
        if level and draw.random() < self._review:
            level = draw.randrange(level)
        return self._cursors[level].next(), self._samples

    def observe(self, group: Group) -> None:
        """Count the group's mean reward when it is of the newest level; open the next when due."""
        rewards = group.rewards
        if self._level_of.get(group.request.prompt.id) != self.level or len(rewards) == 0:
            return
        self._recent.append(float(rewards.mean()))
        full = len(self._recent) == self._recent.maxlen
        if full and self.level + 1 < len(self._cursors) and self.progress >= self._threshold:
            self.level += 1
            self._recent.clear()

    @property
    def progress(self) -> float:
        """Mean reward over the window at the newest level; 0 when nothing was observed yet."""
        return math.fsum(self._recent) / len(self._recent) if self._recent else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "drawn": self._drawn,
            "recent": list(self._recent),
            "cursors": [cursor.state_dict() for cursor in self._cursors],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for cursor, saved in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(saved)
        self.level, self._drawn = int(state["level"]), int(state["drawn"])
        self._recent = deque(state["recent"], maxlen=self._recent.maxlen)
