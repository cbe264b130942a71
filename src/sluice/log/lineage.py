"""What became of every episode in the surviving lineage: the proof that none is lost and none trained twice.

A ResumeRecord takes the run back to a checkpoint: what happened between that checkpoint and the resume is
abandoned. Of the dispositions recorded before it, those with a later step than the checkpoint's are void,
and so are those without a step that were recorded after the checkpoint's cursor: the resumed run meets
those episodes again. Episodes and rewards are never void; they are what is trained again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sluice.log.records import (
    Disposition,
    DispositionRecord,
    Entry,
    EpisodeRecord,
    EvalRecord,
    Kind,
    ResumeRecord,
    RewardRecord,
    keys,
)

ACCOUNTED = frozenset((Kind.EPISODE, Kind.REWARD, Kind.DISPOSITION, Kind.EVAL, Kind.RESUME))
"""The kinds that `account` looks at: `account(reader.read(kinds=ACCOUNTED))`."""


@dataclass(frozen=True, slots=True)
class Account:
    """The fate of every episode. Ids are in log order.

    Attributes:
        surviving: dispositions of the surviving lineage by episode id.
        abandoned: dispositions that a resume made void.
        undecided: logged, of a group, and without a surviving disposition: still in the buffer, or, when the
            run is over, lost. Episodes of evaluations belong to no group and are not accounted for.
        decided_twice: with more than one surviving disposition; trained twice when both are `trained`.
        logged_twice: with more than one episode record.
        unlogged: rewarded, decided or evaluated before the episode itself was in the log.
    """

    surviving: dict[str, tuple[DispositionRecord, ...]]
    abandoned: tuple[DispositionRecord, ...]
    undecided: tuple[str, ...]
    decided_twice: tuple[str, ...]
    logged_twice: tuple[str, ...]
    unlogged: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Nothing was decided or logged twice, and nothing consumed before it was logged."""
        return not (self.decided_twice or self.logged_twice or self.unlogged)

    @property
    def complete(self) -> bool:
        """Sound, and every episode has its disposition: what a finished run must show."""
        return self.sound and not self.undecided

    def trained_at(self, step: int) -> tuple[str, ...]:
        """Ids of the episodes trained at an optimizer step in the surviving lineage."""
        return tuple(
            id
            for id, records in self.surviving.items()
            if any(record.disposition is Disposition.TRAINED and record.step == step for record in records)
        )


def account(entries: Iterable[Entry]) -> Account:
    """Fold the entries of a whole log, in order, into the fate of every episode.

    Keeps ids and dispositions in memory, no tokens. A log whose oldest files were dropped reports their
    episodes as unlogged when later records mention them.
    """
    logged: dict[str, int] = {}
    evaluated: dict[str, int] = {}
    standing: list[tuple[int, DispositionRecord]] = []
    abandoned: list[DispositionRecord] = []
    unlogged: dict[str, None] = {}
    for entry in entries:
        match entry.record:
            case EpisodeRecord(episode) as record:
                counts = logged if keys(record)[1] is not None else evaluated
                counts[episode.id] = counts.get(episode.id, 0) + 1
                continue
            case ResumeRecord() as resume:
                abandoned += [record for seq, record in standing if is_void(seq, record, resume)]
                standing = [(seq, record) for seq, record in standing if not is_void(seq, record, resume)]
                continue
            case DispositionRecord() as record:
                standing.append((entry.seq, record))
                mentioned = (record.episode_id,)
            case RewardRecord(episode_id=id):
                mentioned = (id,)
            case EvalRecord(episode_ids=ids):
                mentioned = ids
            case _:
                continue
        unlogged.update((id, None) for id in mentioned if id not in logged and id not in evaluated)
    surviving: dict[str, tuple[DispositionRecord, ...]] = {}
    for _, record in standing:
        surviving[record.episode_id] = (*surviving.get(record.episode_id, ()), record)
    return Account(
        surviving=surviving,
        abandoned=tuple(abandoned),
        undecided=tuple(id for id in logged if id not in surviving),
        decided_twice=tuple(id for id, records in surviving.items() if len(records) > 1),
        logged_twice=tuple(id for id, count in logged.items() if count > 1),
        unlogged=tuple(unlogged),
    )


def is_void(seq: int, record: DispositionRecord, resume: ResumeRecord) -> bool:
    """Whether a resume takes back a disposition that was recorded before it, as record `seq`."""
    return seq > resume.cursor if record.step is None else record.step > resume.step
