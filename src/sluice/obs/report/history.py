"""The log folded into what the page shows: evaluations, what became of episodes, faults and resumes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sluice.errors import LogError
from sluice.log.lineage import is_void
from sluice.log.reader import LogReader
from sluice.log.records import (
    CheckpointRecord,
    Disposition,
    DispositionRecord,
    Entry,
    EvalRecord,
    FaultRecord,
    Kind,
    ResumeRecord,
    RunRecord,
    VersionRecord,
)

FOLDED = frozenset(
    (Kind.RUN, Kind.RESUME, Kind.DISPOSITION, Kind.VERSION, Kind.CHECKPOINT, Kind.EVAL, Kind.FAULT)
)  # no episodes and no rewards: they are the bulk of a log, and only chosen ones are read
_REASON_LENGTH = 1_000
_VERIFIER = "reward of "
"""Where a verifier failed; the run goes on after it."""


@dataclass(slots=True)
class Fate:
    """What became of one episode in the surviving lineage.

    Attributes:
        step: optimizer step; for what was dropped while a batch was filled, the step of that batch.
        idle: it was trained with advantage 0 everywhere; None where no advantage is recorded.
    """

    seq: int
    record: DispositionRecord
    step: int | None

    @property
    def category(self) -> str:
        """The kind of reason, without its numbers: `filter: equal_rewards`."""
        return category(self.record.reason)

    @property
    def idle(self) -> bool | None:
        given = self.record.advantage
        return None if given is None else not bool(np.any(given))


@dataclass(frozen=True, slots=True)
class Event:
    """A resume, a fault or a checkpoint, in its place on the axis of optimizer steps."""

    kind: str
    step: int
    at: float
    text: str


@dataclass(slots=True)
class History:
    """See the module. Everything is of the surviving lineage; steps are optimizer steps."""

    evaluations: dict[int, EvalRecord] = field(default_factory=dict[int, EvalRecord])
    fates: list[Fate] = field(default_factory=list[Fate])
    events: list[Event] = field(default_factory=list[Event])
    versions: set[str] = field(default_factory=set[str])
    processes: int = 0
    seed: int | None = None
    sluice_versions: tuple[str, ...] = ()
    first_at: float = 0.0
    last_at: float = 0.0
    abandoned: int = 0
    failed: bool = False
    step: int = 0

    @property
    def resumes(self) -> list[Event]:
        return [event for event in self.events if event.kind == "resume"]

    @property
    def faults(self) -> list[Event]:
        return [event for event in self.events if event.kind == "fault"]

    def take(self, entry: Entry) -> None:
        """Fold one entry; they must come in log order."""
        self.first_at = self.first_at or entry.at
        self.last_at = entry.at
        match entry.record:
            case RunRecord(seed=seed, sluice_version=version):
                self.processes += 1
                self.seed, self.failed = seed, False
                if version not in self.sluice_versions:
                    self.sluice_versions = (*self.sluice_versions, version)
            case ResumeRecord() as resume:
                self._resume(entry, resume)
            case DispositionRecord() as record:
                self.fates.append(Fate(entry.seq, record, record.step))
            case VersionRecord(version=version):
                self.versions.add(str(version))
                self._settle(version.step)
            case EvalRecord(step=step) as record:
                self.evaluations[step] = record
            case CheckpointRecord(step=step):
                self.events.append(Event("checkpoint", step, entry.at, f"checkpoint of step {step}"))
            case FaultRecord(what=what, where=where):
                self.failed = self.failed or not where.startswith(_VERIFIER)
                self.events.append(Event("fault", self.step, entry.at, f"{what} ({where})"))
            case _:
                pass

    def _resume(self, entry: Entry, resume: ResumeRecord) -> None:
        kept = [fate for fate in self.fates if not is_void(fate.seq, fate.record, resume)]
        void = len(self.fates) - len(kept)
        self.abandoned += void
        self.fates = kept
        self.evaluations = {step: one for step, one in self.evaluations.items() if step <= resume.step}
        again = f"; what became of {void} episodes was decided again" if void else ""
        self.events.append(Event("resume", resume.step, entry.at, f"resumed at step {resume.step}{again}"))
        self.step = resume.step

    def _settle(self, step: int) -> None:
        """Drops of a batch are written while it is filled; they belong to the step that it became."""
        if step > self.step:
            for fate in reversed(self.fates):
                if fate.step is not None and fate.step != step:
                    break
                fate.step = step
        self.step = step

    def reasons(self) -> list[dict[str, Any]]:
        """Why episodes were not trained, most frequent first: with counts, steps, and an example."""
        count: Counter[tuple[str, str]] = Counter()
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for fate in self.fates:
            if fate.record.disposition in (Disposition.TRAINED, Disposition.KEPT):
                continue
            key = (str(fate.record.disposition), fate.category)
            count[key] += 1
            row = found.setdefault(
                key,
                {"kind": key[0], "reason": key[1], "first": fate.step, "last": fate.step,
                 "example": fate.record.episode_id, "text": fate.record.reason[:_REASON_LENGTH]},
            )  # fmt: skip
            row["last"] = fate.step if fate.step is not None else row["last"]
        return [{**found[key], "count": number} for key, number in count.most_common()]


def category(reason: str) -> str:
    """A reason without what differs from case to case: numbers, and all behind the second colon."""
    parts = [part.strip() for part in reason.split(":")]
    short = ": ".join(parts[:2])
    if parts[0] == "stale" and len(parts) > 1:
        short = "stale: all of its tokens" if parts[1].startswith("all") else "stale: beyond max_lag"
    return re.sub(r"\d+(\.\d+)*", "n", short)[:120]


def read_history(folder: Path, notices: list[str]) -> History | None:
    """Fold the log in `folder` up to its end, or up to where it is damaged; None when nothing can be read."""
    history = History()
    try:
        for entry in _entries(folder):
            history.take(entry)
    except LogError as error:
        notices.append(f"The log could not be read {'to its end' if history.last_at else 'at all'}: {error}")
    return history if history.last_at else None


def _entries(folder: Path) -> Iterator[Entry]:
    return LogReader(folder).read(kinds=FOLDED)
