"""What one batch came to, by metric name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sluice.data.buffer import Dropped
from sluice.data.gate import Judgement
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


def gate_metrics(verdicts: Sequence[tuple[str, Judgement]]) -> dict[str, float]:
    """What the gate decided about the episodes of one batch; `verdicts` are (task, judgement)."""
    lags = [verdict.lag for _, verdict in verdicts]
    return {
        "gate/lag_mean": float(np.mean(lags)) if lags else 0.0,
        "gate/lag_max": float(max(lags, default=0)),
        "gate/masked_tokens": float(sum(verdict.masked_tokens for _, verdict in verdicts)),
    }


def task_metrics(
    groups: Sequence[Group], dropped: Sequence[Dropped], verdicts: Sequence[tuple[str, Judgement]]
) -> dict[str, float]:
    """The same by task, so that a slow, stale or failing one is seen; for runs that have several.

    `reward/task/NAME` and `speed/task/NAME` (seconds an episode took) are there when an episode counted.
    """
    metrics: dict[str, float] = {}
    for task in sorted({group.request.prompt.task for group in (*groups, *(drop.group for drop in dropped))}):
        mine = [group for group in groups if group.request.prompt.task == task]
        members = [member for group in mine for member in group.members]
        rewards = [member.reward.total for member in members if member.reward is not None]
        tokens = [member.episode.num_sampled_tokens for member in members if member.reward is not None]
        seconds = [float(member.episode.info["seconds"]) for member in members if "seconds" in member.episode.info]
        if rewards:
            metrics[f"reward/task/{task}"] = float(np.mean(rewards))
            metrics[f"task/{task}/response_tokens"] = float(np.mean(tokens))
        if seconds:
            metrics[f"speed/task/{task}"] = float(np.mean(seconds))
        metrics |= {
            f"task/{task}/groups": float(len(mine)),
            f"task/{task}/groups_dropped": float(sum(drop.group.request.prompt.task == task for drop in dropped)),
            f"task/{task}/episodes": float(len(members)),
            f"task/{task}/infra_failure": float(sum(m.episode.outcome is Outcome.INFRA_FAILURE for m in members)),
        }
        gate = gate_metrics([(name, verdict) for name, verdict in verdicts if name == task])
        metrics |= {f"task/{task}/{name.removeprefix('gate/')}": value for name, value in gate.items()}
    return metrics


def padding_metrics(groups: Sequence[Group], padded: Sequence[Group], *, by_task: bool) -> dict[str, float]:
    """What padding made of the groups of one batch: repeats, and sampled tokens in them."""
    counts: Counter[str] = Counter({"rollout/repeated": 0, "rollout/repeated_tokens": 0})
    for before, after in zip(groups, padded, strict=True):
        task = before.request.prompt.task
        for old, new in zip(before.members, after.members, strict=True):
            again = int(new is not old)
            counts["rollout/repeated"] += again
            counts["rollout/repeated_tokens"] += again * new.episode.num_sampled_tokens
            if by_task:
                counts[f"task/{task}/repeated"] += again
    return {name: float(count) for name, count in counts.items()}


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
