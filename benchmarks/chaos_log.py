"""What the log of a run shows that was hit by faults: whether anything was lost, and how long until it went on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
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


def prove(config: RunConfig, *, steps_of: int, bound: int) -> dict[str, Any]:
    """What the log of a run that is over shows. SystemExit when it is not what it must be.

    Args:
        steps_of: episodes of a step's batch.
        bound: largest lag of a trained token.
    """
    log = LogReader(config.folder / "log")
    fate = account(log.read(kinds=ACCOUNTED))
    trained = lags(log.read(kinds=(Kind.VERSION, Kind.EPISODE, Kind.DISPOSITION)), bound)
    records = [record for each in fate.surviving.values() for record in each]
    batches = Counter(record.step for record in records)  # trained, or with a reason why not
    partial = [step for step in range(1, config.steps + 1) if batches[step] != steps_of]
    shown = {
        "records": log.latest,
        "steps": config.steps,
        "finished_episodes": len(fate.surviving) + len(fate.undecided),
        "lost": len(fate.undecided),
        "decided_twice": len(fate.decided_twice),
        "consumed_before_logged": len(fate.unlogged),
        "steps_without_their_batch": len(partial),
        "fates": dict(Counter(f"{each.disposition}: {each.reason}".rstrip(": ") for each in records)),
        "lag_bound": bound,
        "trained_spans_by_lag": {str(lag): trained[lag] for lag in sorted(trained)},
        "updates_taken_back": len({record.step for record in fate.abandoned if record.step is not None}),
        "sampled_again": len(fate.logged_twice),
        "resumes": sum(1 for _ in log.read(kinds=(Kind.RESUME,))),
    }
    broken = fate.undecided or fate.decided_twice or fate.unlogged or partial
    if broken or max(trained) > bound or not (config.folder / "summary.json").exists():
        raise SystemExit(f"the log does not hold what it must: {shown}, {partial=}")
    return shown


def figures(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and largest, in seconds."""
    ordered = sorted(seconds)
    at = lambda share: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)  # noqa: E731
    return {"p50": at(0.5), "p99": at(0.99), "max": at(1.0)}
