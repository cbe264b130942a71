"""The durable log of a run: every finished episode, and what became of it, before anyone may use it.

    loop ──append──► LogWriter ──► log/000001.sqlite … ◄──read── LogReader ◄── trainer, resume, replay,
                     (one)         (SQLite, WAL)                 (many)         audit, dashboard, CLI

Records (`records`) are numbered by one global `seq` that goes on over the files; the `seq` of the last one
dealt with is a reader's cursor. What survives a kill, a power cut and a damaged file is in `writer`; how a
resume makes dispositions void is in `lineage`.
"""

from sluice.log.jsonl import to_json
from sluice.log.lineage import ACCOUNTED, Account, account
from sluice.log.reader import LogReader
from sluice.log.records import (
    CheckpointRecord,
    Disposition,
    DispositionRecord,
    Entry,
    EpisodeRecord,
    EvalRecord,
    FaultRecord,
    GroupRecord,
    Kind,
    Record,
    ResumeRecord,
    RewardRecord,
    RunRecord,
    TurnRecord,
    VersionRecord,
)
from sluice.log.repair import Repair, repair
from sluice.log.retention import drop_through
from sluice.log.writer import Durability, LogWriter

__all__ = [
    "ACCOUNTED",
    "Account",
    "CheckpointRecord",
    "Disposition",
    "DispositionRecord",
    "Durability",
    "Entry",
    "EpisodeRecord",
    "EvalRecord",
    "FaultRecord",
    "GroupRecord",
    "Kind",
    "LogReader",
    "LogWriter",
    "Record",
    "Repair",
    "ResumeRecord",
    "RewardRecord",
    "RunRecord",
    "TurnRecord",
    "VersionRecord",
    "account",
    "drop_through",
    "repair",
    "to_json",
]
