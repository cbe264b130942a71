"""Which episodes go into the page: a run has more of them than a page can hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from sluice.obs.report.history import Fate, History

DEFAULT_EPISODES = 160
_TRAINED_STEPS = 5
_EVALUATIONS = 6
_REASONS = 12


@dataclass(slots=True)
class Chapter:
    """Episodes that belong together: those of one batch, or of one evaluation.

    Attributes:
        kind: `eval`, `train`, or `reason` (an example of every reason not to train).
        step: batch.
        units: groups that could be shown, most telling first; each a list of episode ids.
        total: episodes there are.
    """

    kind: str
    step: int
    units: list[list[str]] = field(default_factory=list[list[str]])
    total: int = 0


def chapters(history: History, batch_of: Callable[[int], int], steps: Collection[int] | None) -> list[Chapter]:
    """What can be chosen from.

    Args:
        steps: batches that are wanted; None takes the first, the last and some between.
    """
    found = [
        _examples(history, batch_of),
        *_evaluations(history, batch_of, steps),
        *_batches(history, batch_of, steps),
    ]
    return [chapter for chapter in found if chapter.units]


def in_turns(found: Sequence[Chapter], limit: int) -> Iterator[tuple[Chapter, list[str]]]:
    """Units of all chapters in turns, until `limit` episodes are given; examples of reasons first."""
    first = [chapter for chapter in found if chapter.kind == "reason"]
    rest = [chapter for chapter in found if chapter.kind != "reason"]
    taken: set[str] = set()
    for chapters_now in (first, rest):
        for units in zip_longest(*(chapter.units for chapter in chapters_now)):
            for chapter, unit in zip(chapters_now, units, strict=True):
                fresh = [id for id in unit or () if id not in taken][: limit - len(taken)]
                if fresh:
                    taken.update(fresh)
                    yield chapter, fresh


def spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values: the first, the last, and evenly between."""
    if len(values) <= count:
        return list(values)
    return sorted({values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)})


def _examples(history: History, batch_of: Callable[[int], int]) -> Chapter:
    rows = history.reasons()[:_REASONS]
    step = batch_of(rows[0]["first"] or 0) if rows else 0
    return Chapter("reason", step, [[row["example"]] for row in rows], sum(row["count"] for row in rows))


def _evaluations(history: History, batch_of: Callable[[int], int], steps: Collection[int] | None) -> Iterator[Chapter]:
    by_batch = {batch_of(step): record for step, record in sorted(history.evaluations.items())}
    wanted = sorted(by_batch) if steps is None else sorted(set(by_batch) & set(steps))
    for batch in spread(wanted or sorted(by_batch), _EVALUATIONS if steps is None or not wanted else len(wanted)):
        prompts: dict[str, list[str]] = {}
        for id in by_batch[batch].episode_ids:
            prompts.setdefault(id.rpartition(".")[0], []).append(id)
        units = [[*ids, f"greedy-{name.removeprefix('eval-')}.0"] for name, ids in prompts.items()]
        yield Chapter("eval", batch, units, len(by_batch[batch].episode_ids))


def _batches(history: History, batch_of: Callable[[int], int], steps: Collection[int] | None) -> Iterator[Chapter]:
    by_batch: dict[int, list[Fate]] = {}
    for fate in history.fates:
        if fate.step is not None:
            by_batch.setdefault(batch_of(fate.step), []).append(fate)
    known = sorted(by_batch)
    for batch in spread(known, _TRAINED_STEPS) if steps is None else sorted(set(known) & set(steps)):
        groups: dict[str, list[Fate]] = {}
        for fate in by_batch[batch]:
            groups.setdefault(fate.record.group_id, []).append(fate)
        told = sorted(groups.values(), key=lambda group: all(fate.idle is not False for fate in group))
        yield Chapter(
            "train", batch, [[fate.record.episode_id for fate in group] for group in told], len(by_batch[batch])
        )
