"""What one batch came to, by metric name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sluice.data.buffer import Dropped
from sluice.train.base import StepStats
from sluice.types import Episode, Group, Outcome


def session_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What sessions counted, summed over a batch: turns, segments, forks, mismatches, malformed calls."""
    total: Counter[str] = Counter()
    for episode in episodes:
        total.update(episode.info.get("counters", {}))
    return {f"session/{name}": float(count) for name, count in sorted(total.items())}


def rollout_metrics(groups: Sequence[Group], dropped: Sequence[Dropped]) -> dict[str, float]:
    """Rewards, lengths, outcomes and drops of one batch."""
    members = [member for group in groups for member in group.members]
    valid = [member for member in members if member.reward is not None]
    totals = [member.reward.total for member in valid if member.reward is not None]
    seen = totals + [float(r) for drop in dropped for r in drop.group.rewards]
    metrics = session_metrics([member.episode for member in members]) | {
        "reward/mean": float(np.mean(totals)) if totals else 0.0,
        "reward/std": float(np.std(totals)) if totals else 0.0,
        "reward/mean_with_dropped": float(np.mean(seen)) if seen else 0.0,
        "rollout/response_tokens": float(np.mean([m.episode.num_sampled_tokens for m in valid])) if valid else 0.0,
        "rollout/groups_dropped": float(len(dropped)),
        "rollout/episodes": float(len(members)),
    }
    names = sorted({name for m in valid if m.reward is not None for name in m.reward.components})
    for name in names:
        values = [m.reward.components[name] for m in valid if m.reward is not None and name in m.reward.components]
        metrics[f"reward/component/{name}"] = float(np.mean(values))
    for outcome in Outcome:
        metrics[f"rollout/{outcome.value}"] = float(sum(m.episode.outcome is outcome for m in members))
    return metrics


def train_metrics(stats: Sequence[StepStats]) -> dict[str, float]:
    """Means over the updates of one batch; the mismatch is that of the first, before any update."""
    metrics = {
        "train/loss": float(np.mean([stat.loss for stat in stats])),
        "train/grad_norm": float(np.mean([stat.grad_norm for stat in stats])),
        "train/entropy": float(np.mean([stat.entropy for stat in stats])),
        "train/lr": stats[-1].lr,
        "train/tokens": float(sum(stat.num_tokens for stat in stats)),
    }
    for name in stats[0].metrics:
        metrics[f"train/{name}"] = float(np.mean([stat.metrics[name] for stat in stats if name in stat.metrics]))
    mismatch = stats[0].mismatch
    if mismatch is not None:
        metrics["mismatch/mean_abs"] = mismatch.mean_abs
        metrics["mismatch/p999"] = mismatch.p999
        metrics["mismatch/max_abs"] = mismatch.max_abs
        metrics["mismatch/kl"] = mismatch.kl
    return metrics
