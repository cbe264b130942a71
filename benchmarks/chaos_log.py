"""What the log of a run shows that was hit by faults: whether anything was lost, and how long until it went on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.config import RunConfig
from sluice.log import (
    ACCOUNTED,
    Disposition,
    DispositionRecord,
    Entry,
    EpisodeRecord,
    Kind,
    LogReader,
    VersionRecord,
    account,
)
from sluice.types import VersionSpan
from sluice.weights.lineage import Born, Lineage

NUMBER = re.compile(r"\d+")
MUST_NOT_BE = (
    "lost",
    "decided_twice",
    "consumed_before_logged",
    "steps_without_their_batch",
    "beyond_the_lag_bound",
    "failed_and_trained",
    "told_finished_and_not_logged",
)
"""What the log of a run must hold none of."""


def recovery(log: LogReader, at: float, cursor: int) -> tuple[float | None, float | None]:
    """Seconds from a fault to the next finished episode and to the next update; None for what did not happen yet.

    Args:
        at: Unix time of the fault.
        cursor: last record of the log before it.
    """
    episode: float | None = None
    update: float | None = None
    for entry in log.read(after=cursor, kinds=(Kind.EPISODE, Kind.DISPOSITION)):
        record, seconds = entry.record, entry.at - at
        if seconds < 0:
            continue
        if isinstance(record, EpisodeRecord) and episode is None:
            episode = seconds
        if isinstance(record, DispositionRecord) and record.disposition is Disposition.TRAINED and update is None:
            update = seconds
        if episode is not None and update is not None:
            break
    return episode, update


def lags(entries: Iterable[Entry], bound: int) -> Counter[int]:
    """How many sampled spans were trained with which lag, by the versions and the order of the log.

    Spans beyond the bound are left out where the record says that as many tokens were masked. Updates that a resume
    took back count as well. A step's dispositions stand before the version that it made.
    """
    found: Counter[int] = Counter()
    born: list[Born] = []
    lineage = Lineage()
    spans: dict[str, list[VersionSpan]] = {}
    for entry in entries:
        match entry.record:
            case VersionRecord(version, parent, checksum):
                born.append(Born(version, parent, checksum))
                lineage = Lineage(born)
                lineage.current = version
            case EpisodeRecord(episode):
                spans[episode.id] = [span for turn in episode.sampled_turns() for span in turn.spans]
            case DispositionRecord(episode_id=id, disposition=Disposition.TRAINED, masked_tokens=masked):
                rows = [(lineage.lag(span.version), span.end - span.start) for span in spans[id]]
                spared = sum(tokens for lag, tokens in rows if lag > bound) == masked
                found.update(lag for lag, _ in rows if lag <= bound or not spared)
            case _:
                pass
    return found


@dataclass(frozen=True, slots=True)
class Recovered:
    """Seconds from a fault to the next finished episode and to the next update."""

    what: str
    to_episode: float | None
    to_update: float | None


def prove(config: RunConfig, journal: Path, *, of_a_step: int, bound: int) -> dict[str, Any]:
    """What the log of a run that is over shows. SystemExit when it is not what it must be.

    Args:
        journal: what agents were told that it was finished, and the marks that they gave as a reward.
        of_a_step: episodes of its batch.
        bound: largest lag of a trained token.
    """
    log = LogReader(config.folder / "log")
    fate = account(log.read(kinds=ACCOUNTED))
    trained = lags(log.read(kinds=(Kind.VERSION, Kind.EPISODE, Kind.DISPOSITION)), bound)
    records = [record for each in fate.surviving.values() for record in each]
    batches = Counter(record.step for record in records)  # trained, or with a reason why not
    shown: dict[str, Any] = {
        "records": log.latest,
        "steps": config.steps,
        "finished_episodes": len(fate.surviving) + len(fate.undecided),
        "lost": len(fate.undecided),
        "decided_twice": len(fate.decided_twice),
        "consumed_before_logged": len(fate.unlogged),
        "steps_without_their_batch": sum(batches[step] != of_a_step for step in range(1, config.steps + 1)),
        "beyond_the_lag_bound": sum(count for lag, count in trained.items() if lag > bound),
        **elsewhere(log, journal, {each.episode_id for each in records if each.disposition is Disposition.TRAINED}),
    }
    if any(shown[name] for name in MUST_NOT_BE) or not (config.folder / "summary.json").exists():
        raise SystemExit(f"the log does not hold what it must: {shown}")
    return shown | {
        "fates": Counter(NUMBER.sub("N", f"{each.disposition}: {each.reason}".rstrip(": ")) for each in records),
        "trained_spans_by_lag": Counter({str(lag): trained[lag] for lag in sorted(trained)}),
        "updates_taken_back": len({record.step for record in fate.abandoned if record.step is not None}),
        "sampled_again": len(fate.logged_twice),
        "resumes": sum(1 for _ in log.read(kinds=(Kind.RESUME,))),
    }


def elsewhere(log: LogReader, journal: Path, trained: Set[str]) -> dict[str, Any]:
    """How the log and what the agents were told agree.

    A finish is told again when the one that was told is not in the log: with the controller that told it, it died.
    """
    marks: dict[str, list[float]] = {}
    outcomes: Counter[str] = Counter()
    failed: set[str] = set()
    for entry in log.read(kinds=(Kind.EPISODE,)):
        assert isinstance(entry.record, EpisodeRecord)
        episode = entry.record.episode
        outcomes[f"{episode.outcome}: {episode.reason}".rstrip(": ")] += 1
        marks.setdefault(episode.id, []).append(episode.info.get("rewards", {}).get("mark"))
        (failed.add if not episode.outcome.counts else failed.discard)(episode.id)
    told = [json.loads(line) for line in journal.read_text().splitlines()]
    missing = [each for each in told if each["mark"] not in marks.get(each["id"], [])]
    return {
        "outcomes": outcomes,
        "told_finished": len(told),
        "told_finished_and_not_logged": len(missing),
        "failed_and_trained": len(failed & trained),
    }


def summed(runs: Sequence[tuple[dict[str, Any], Sequence[Recovered]]]) -> dict[str, Any]:
    """Several runs as one: sums of what their logs show, and the spread of the times."""
    times = [each for _, found in runs for each in found]
    proof: dict[str, Any] = {}
    for shown, _ in runs:
        proof = {name: value + proof[name] if proof else value for name, value in shown.items()}
    return {
        "faults": len(times),
        "runs": len(runs),
        "proof": proof,
        "recovery_seconds": {
            what: {
                "count": len(chosen),
                "to_next_episode": figures([each.to_episode or 0.0 for each in chosen]),
                "to_next_update": figures([each.to_update or 0.0 for each in chosen]),
            }
            for what in ("all", *sorted({each.what for each in times}))
            for chosen in [[each for each in times if what in ("all", each.what)]]
        },
    }


def figures(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and largest, in seconds."""
    ordered = sorted(seconds)
    at = lambda share: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)  # noqa: E731
    return {"p50": at(0.5), "p99": at(0.99), "max": at(1.0)}
