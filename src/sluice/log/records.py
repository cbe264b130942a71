"""The kinds of record in the log, one frozen dataclass each.

A record says what happened and is never changed: a later record overrules an earlier one (a disposition
after a resume, say), and who wants the present state folds over them. Fields are stored by name, derived
from these classes and from `sluice.types`, so that a new field needs no entry in any list of keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, TypeAlias

from sluice.types import Episode, Floats, GroupRequest, Reward, Turn, Version


class Kind(StrEnum):
    """What a record is, as it stands in the log."""

    RUN = "run"
    RESUME = "resume"
    GROUP = "group"
    EPISODE = "episode"
    REWARD = "reward"
    DISPOSITION = "disposition"
    VERSION = "version"
    CHECKPOINT = "checkpoint"
    EVAL = "eval"
    FAULT = "fault"
    TURN = "turn"


class Disposition(StrEnum):
    """What became of a finished episode.

    * trained: at least one of its tokens was in the loss of a step.
    * excluded: its outcome does not count, so it was in no statistic and in no loss.
    * dropped: valid and in its group's statistics, but kept out of the loss (a filter, or all of it stale).
    * kept: valid, in a batch of a run that trains nothing.
    """

    TRAINED = "trained"
    EXCLUDED = "excluded"
    DROPPED = "dropped"
    KEPT = "kept"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A process began to write. `config_digest` names the resolved config in the run folder."""

    kind: ClassVar[Kind] = Kind.RUN
    config_digest: str
    seed: int
    sluice_version: str


@dataclass(frozen=True, slots=True)
class ResumeRecord:
    """The run went back to a checkpoint: what it did after that is abandoned (see `lineage`).

    Attributes:
        step: optimizer step of the checkpoint; what was trained at a later step before this record is void.
        cursor: the log cursor stored in the checkpoint.
    """

    kind: ClassVar[Kind] = Kind.RESUME
    step: int
    cursor: int


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """A group was dispatched."""

    kind: ClassVar[Kind] = Kind.GROUP
    request: GroupRequest


@dataclass(frozen=True, slots=True, eq=False)
class EpisodeRecord:
    """An episode finished, whatever its outcome: the whole of it, token for token."""

    kind: ClassVar[Kind] = Kind.EPISODE
    episode: Episode


@dataclass(frozen=True, slots=True)
class RewardRecord:
    """An episode was scored: every component with its weight."""

    kind: ClassVar[Kind] = Kind.REWARD
    episode_id: str
    reward: Reward


@dataclass(frozen=True, slots=True)
class DispositionRecord:
    """What became of an episode.

    Attributes:
        step: optimizer step; required for `trained`. Give it for the others when the decision belongs to one.
        reason: why it is excluded or dropped, for example `infra_failure` or `stale: lag 3 > 1`.
        masked_tokens: sampled tokens that staleness took out of the loss.
        advantage: what the trainer was given for the sampled tokens, in order of segments and positions: shape `[1]`
            when it is the same at all of them, else `[sampled tokens]`; None when nothing was trained.
    """

    kind: ClassVar[Kind] = Kind.DISPOSITION
    episode_id: str
    group_id: str
    disposition: Disposition
    step: int | None = None
    reason: str = ""
    masked_tokens: int = 0
    advantage: Floats | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.disposition is Disposition.TRAINED and self.step is None:
            raise ValueError(f"the disposition of {self.episode_id} is 'trained' without a step")
        if self.disposition in (Disposition.EXCLUDED, Disposition.DROPPED) and not self.reason:
            raise ValueError(f"the disposition of {self.episode_id} is '{self.disposition}' without a reason")


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """Weights were published. `parent` is None for the first version; `checksum` is that of the manifest."""

    kind: ClassVar[Kind] = Kind.VERSION
    version: Version
    parent: Version | None
    checksum: str


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A checkpoint of `step` is complete on disk; `version` was in use."""

    kind: ClassVar[Kind] = Kind.CHECKPOINT
    step: int
    version: Version


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """An evaluation: its metrics, and the ids of its episodes, which are in the log like any other."""

    kind: ClassVar[Kind] = Kind.EVAL
    step: int
    version: Version
    metrics: Mapping[str, float]
    episode_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """Something broke: what, where (part, rank, phase, version), and the traceback, which may be empty."""

    kind: ClassVar[Kind] = Kind.FAULT
    what: str
    where: str
    traceback: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class TurnRecord:
    """The engine ended a turn of an episode that is under way. Kept in a log of its own, until the episode is logged.

    Attributes:
        asked: digest of everything that was asked for; a request with the same one is answered by this turn.
        bound: steps of lag that the gate promised for the episode's group; None when it promised nothing.
    """

    kind: ClassVar[Kind] = Kind.TURN
    episode_id: str
    asked: str
    turn: Turn
    bound: int | None = None


Record: TypeAlias = (
    RunRecord
    | ResumeRecord
    | GroupRecord
    | EpisodeRecord
    | RewardRecord
    | DispositionRecord
    | VersionRecord
    | CheckpointRecord
    | EvalRecord
    | FaultRecord
    | TurnRecord
)

RECORDS: Mapping[Kind, type[Record]] = {
    record.kind: record
    for record in (
        RunRecord,
        ResumeRecord,
        GroupRecord,
        EpisodeRecord,
        RewardRecord,
        DispositionRecord,
        VersionRecord,
        CheckpointRecord,
        EvalRecord,
        FaultRecord,
        TurnRecord,
    )
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in its place.

    Attributes:
        seq: its number, from 1, without gaps over all files of the log. A reader's cursor is the `seq` of
            the last entry it has dealt with.
        at: when it was appended, Unix time in seconds.
        record: what was appended.
    """

    seq: int
    at: float
    record: Record


_ORDINAL = re.compile(r"g(\d{1,18})(?:\.\d+)?")


def keys(record: Record) -> tuple[str | None, int | None]:
    """What the log can find a record by: the episode id it is about, and the ordinal of its group.

    The ordinal is read from `GroupRequest.id` and `episode_id` names (`g000017`, `g000017.2`); other names,
    those of evaluations for example, have none.
    """
    match record:
        case GroupRecord(request):
            return None, request.ordinal
        case EpisodeRecord(episode):
            return episode.id, _ordinal(episode.group_id)
        case RewardRecord(episode_id=id) | TurnRecord(episode_id=id):
            return id, _ordinal(id)
        case DispositionRecord(episode_id=id, group_id=group):
            return id, _ordinal(group)
        case _:
            return None, None


def _ordinal(id: str) -> int | None:
    found = _ORDINAL.fullmatch(id)
    return int(found[1]) if found else None
