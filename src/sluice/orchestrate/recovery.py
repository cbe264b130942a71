"""Resume: what the log of an interrupted run still holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sluice.log.reader import LogReader
from sluice.log.records import EpisodeRecord, GroupRecord, Kind, RewardRecord, VersionRecord
from sluice.orchestrate.producer import Recovered
from sluice.types import GroupRequest, Outcome, Scored, expand
from sluice.weights.lineage import Born


def logged_versions(folder: Path) -> list[Born]:
    """Every version that was ever published, abandoned ones included."""
    records = (entry.record for entry in LogReader(folder).read(kinds=(Kind.VERSION,)))
    return [Born(r.version, r.parent, r.checksum) for r in records if isinstance(r, VersionRecord)]


def logged_episodes(folder: Path, first_group: int) -> dict[str, Recovered]:
    """Finished training episodes of groups with at least this ordinal, newest record of each id, in log order."""
    found: dict[str, Recovered] = {}
    for entry in LogReader(folder).read(kinds=(Kind.EPISODE, Kind.REWARD), from_ordinal=first_group):
        record = entry.record
        if isinstance(record, EpisodeRecord):
            found.pop(record.episode.id, None)
            found[record.episode.id] = Recovered(record.episode, None)
        elif isinstance(record, RewardRecord) and record.episode_id in found:
            found[record.episode_id] = Recovered(found[record.episode_id].episode, record.reward)
    return found


def alive_requests(folder: Path, buffer: Mapping[str, Any]) -> dict[str, GroupRequest]:
    """The groups alive in a checkpoint's buffer and those it asks for again, by id, as they were dispatched."""
    ids = {slot["group"] for slot in buffer["slots"]} | set(buffer.get("again", []))
    start = 0 if buffer.get("again") else first_alive(buffer)
    records = (e.record for e in LogReader(folder).read(kinds=(Kind.GROUP,), from_ordinal=start))
    return {r.request.id: r.request for r in records if isinstance(r, GroupRecord) and r.request.id in ids}


def alive_episodes(buffer: Mapping[str, Any], recovered: Mapping[str, Recovered]) -> dict[str, Scored]:
    """Episodes that a checkpoint's buffer counts as finished, as the buffer holds them."""
    ids = [id for slot in buffer["slots"] for id in slot["finished"]]
    scored: dict[str, Scored] = {}
    for id in ids:
        if id in recovered:
            episode, reward = recovered[id].episode, recovered[id].reward
            if episode.outcome.counts and reward is None:  # its verifier failed, see Producer.judge
                reason = "its verifier failed before the interruption"
                episode = replace(episode, outcome=Outcome.INFRA_FAILURE, reason=reason)
            scored[id] = Scored(episode, reward, expand(episode) if episode.outcome.counts else ())
    return scored


def first_alive(buffer: Mapping[str, Any]) -> int:
    """Ordinal of the oldest group alive in a checkpoint's buffer, or of the next one."""
    return min((int(slot["ordinal"]) for slot in buffer["slots"]), default=int(buffer["next_ordinal"]))
