"""What became of the episodes of a batch, as it goes into the log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from sluice.data.gate import Judgement
from sluice.log.records import Disposition, DispositionRecord
from sluice.types import Episode, Floats, Scored, TrainSample


def excluded(episode: Episode, step: int | None = None) -> DispositionRecord:
    """Of an episode whose outcome does not count."""
    reason = f"{episode.outcome.value}: {episode.reason}".rstrip(": ")
    return DispositionRecord(episode.id, episode.group_id, Disposition.EXCLUDED, step, reason)


def disposition(member: Scored, verdict: Judgement, step: int) -> DispositionRecord:
    """What became of a valid episode of the batch: trained unless all of it was taken out of the loss."""
    episode = member.episode
    tokens = episode.num_sampled_tokens
    stale = verdict.masked_tokens == tokens
    reason = verdict.dropped or (f"stale: all of its {tokens} tokens" if stale else "")
    kind = Disposition.DROPPED if reason else Disposition.TRAINED
    return DispositionRecord(episode.id, episode.group_id, kind, step, reason, verdict.masked_tokens)


def with_advantages(
    records: Iterable[DispositionRecord], updates: Iterable[Sequence[TrainSample]]
) -> list[DispositionRecord]:
    """The records with what the trainer was given: advantages may need scores that nobody has later on."""
    given: dict[str, list[Floats]] = {}
    for samples in updates:
        for sample in samples:
            sampled = sample["version"] >= 0
            given.setdefault(sample.episode_id, []).append(sample["advantage"][sampled].astype(np.float32))
    return [
        replace(record, advantage=_compact(np.concatenate(given[record.episode_id])))
        if record.disposition is Disposition.TRAINED and record.episode_id in given
        else record
        for record in records
    ]


def _compact(values: Floats) -> Floats:
    return values[:1] if len(values) and np.all(values == values[0]) else values
