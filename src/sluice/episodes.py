"""`sluice episodes`: the records of a run's log, filtered, as JSON lines; with `text`, the turns decoded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sluice.config.run import RunConfig
from sluice.errors import ConfigError, LogError
from sluice.log.jsonl import to_json
from sluice.log.lineage import ACCOUNTED, account
from sluice.log.reader import LogReader
from sluice.log.records import (
    CheckpointRecord,
    DispositionRecord,
    Entry,
    EpisodeRecord,
    EvalRecord,
    Kind,
    ResumeRecord,
    TurnRecord,
    VersionRecord,
    keys,
)
from sluice.nearest import nearest
from sluice.types import Outcome, Version

_Kind = TypeVar("_Kind", Kind, Outcome)


@dataclass(frozen=True, slots=True)
class Query:
    """Which records are wanted; None does not filter.

    Attributes:
        step: records of this optimizer step, and everything about the episodes that it trained (in the
            surviving lineage).
        group: ordinal of a group: its request, episodes, rewards and dispositions.
        kind: one kind of record.
        outcome: episodes that ended like this.
        limit: at most this many records.
    """

    step: int | None = None
    group: int | None = None
    kind: Kind | None = None
    outcome: Outcome | None = None
    limit: int | None = None


def make_query(
    *, step: int | None, group: str | None, kind: str | None, outcome: str | None, limit: int | None
) -> Query:
    """A query as the command line gives it. Raises ConfigError naming the flag and the valid values."""
    return Query(
        step=step,
        group=None if group is None else _group_ordinal(group),
        kind=None if kind is None else _member(Kind, kind, "--kind"),
        outcome=None if outcome is None else _member(Outcome, outcome, "--outcome"),
        limit=limit,
    )


def _member(kinds: type[_Kind], text: str, flag: str) -> _Kind:
    valid = [member.value for member in kinds]
    if text in valid:
        return kinds(text)
    meant = nearest(text, valid)
    raise ConfigError(
        f"{flag} {text}: not one of {', '.join(valid)}",
        hint=f"did you mean {meant}?" if meant else "give one of them",
    )


def _group_ordinal(text: str) -> int:
    """`g000017`, `17` or an episode's id `g000017.2` → 17."""
    digits = text.removeprefix("g").partition(".")[0]
    if not digits.isdecimal():
        raise ConfigError(f"--group {text}: not the id of a group", hint="give one such as g000017, or its number")
    return int(digits)


def run_folder(run: str) -> Path:
    """The folder of a run, by its path or its name under `runs/`. Raises LogError when it has no log."""
    candidates = (Path(run), Path("runs") / run)
    for folder in candidates:
        if (folder / "log").is_dir():
            return folder
    raise LogError(
        f"there is no run with a log in {' or '.join(map(str, candidates))}", hint="give the folder of a run"
    )


def select(folder: Path, query: Query) -> Iterator[Entry]:
    """The wanted entries of the log in a run folder, in log order; turns lie in a log of their own, if at all."""
    turns = folder / "turns"
    if query.kind is Kind.TURN and not turns.is_dir():
        return iter(())
    reader = LogReader(turns if query.kind is Kind.TURN else folder / "log")
    tests: list[Callable[[Entry], bool]] = []
    if query.step is not None:
        trained = set(account(LogReader(folder / "log").read(kinds=ACCOUNTED)).trained_at(query.step))
        tests.append(lambda entry: _at_step(entry, query.step, trained))
    if query.group is not None:
        tests.append(lambda entry: keys(entry.record)[1] == query.group)
    if query.outcome is not None:
        tests.append(lambda entry: _outcome(entry) is query.outcome)
    kind = Kind.EPISODE if query.outcome is not None and query.kind is None else query.kind
    entries = reader.read(kinds=None if kind is None else (kind,), from_ordinal=query.group)
    return islice((entry for entry in entries if all(test(entry) for test in tests)), query.limit)


def _at_step(entry: Entry, step: int | None, trained: set[str]) -> bool:
    match entry.record:
        case VersionRecord(version=Version(step=at)):
            return at == step
        case EvalRecord(step=at) | CheckpointRecord(step=at) | ResumeRecord(step=at):
            return at == step
        case DispositionRecord(step=at) if at is not None:
            return at == step
        case _:
            return keys(entry.record)[0] in trained


def _outcome(entry: Entry) -> Outcome | None:
    return entry.record.episode.outcome if isinstance(entry.record, EpisodeRecord) else None


def print_lines(lines: Iterable[dict[str, Any]]) -> None:
    """JSON lines on stdout. Ends quietly when the reader closes the pipe (`| head`)."""
    try:
        for line in lines:
            sys.stdout.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes again at exit


def render(folder: Path, entries: Iterable[Entry], *, text: bool) -> Iterator[dict[str, Any]]:
    """Entries as JSON; with `text`, each turn of an episode has the text of its tokens."""
    decode = _decoder(folder) if text else None
    for entry in entries:
        line = to_json(entry)
        if decode is not None and isinstance(entry.record, EpisodeRecord):
            for segment in line["episode"]["segments"]:
                for turn in segment["turns"]:
                    turn["text"] = decode(turn["ids"])
        if decode is not None and isinstance(entry.record, TurnRecord):
            line["turn"]["text"] = decode(line["turn"]["ids"])
        yield line


def _decoder(folder: Path) -> Callable[[list[int]], str]:
    from sluice.models.build import load_tokenizer

    saved = folder / "config.json"
    if not saved.is_file():
        raise ConfigError(f"{folder} has no config.json, which names the tokenizer", hint="leave --text away")
    config = RunConfig.model_validate(json.loads(saved.read_text(encoding="utf-8")))
    tokenizer = load_tokenizer(config.model.path or folder / "model-init")
    return lambda ids: str(tokenizer.decode(ids))
