"""What happened, in words. Every sentence comes from figures of the run by a rule that stands beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean, median
from typing import NamedTuple

from sluice.log.records import Disposition
from sluice.obs.format import duration, number, shorten
from sluice.obs.report.folder import RunFolder

COLLAPSED = 0.2
"""Entropy below this share of its start is called a collapse."""
DROPPED = 0.5
"""Share of dropped groups above which is warned."""
STALE = 0.1
"""Share of sampled tokens taken out of the loss as stale above which is warned."""
INFRA = 0.01
"""Share of episodes lost to infrastructure above which is warned."""
TRUNCATED = 0.2
"""Share of truncated episodes above which is warned."""
IDLE = 0.5
"""Share of trained episodes with advantage 0 above which is warned."""
SPIKE = 10.0
"""A gradient norm of so many times the median is called a spike."""


class Finding(NamedTuple):
    """A sentence, the rule that made it, and how grave it is: `good`, `note`, `warning` or `bad`."""

    level: str
    text: str
    rule: str


def findings(run: RunFolder) -> list[Finding]:
    """Everything that can be said of a run, gravest first among the warnings, the result first of all."""
    said: list[Finding] = []
    for rule in _RULES:
        said += rule(run)
    order = {"bad": 1, "warning": 2}
    return sorted(said, key=lambda one: order.get(one.level, 0))


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────────


def _state(run: RunFolder) -> Iterator[Finding]:
    planned = f" of {run.planned}" if run.planned is not None else ""
    rule = "Finished: summary.json names the last step. Running: the log has grown in the last two minutes."
    if run.state == "finished":
        return
    if run.state == "failed":
        assert run.history is not None  # else it would not have failed
        last = shorten(run.history.faults[-1].text, 400) if run.history.faults else ""
        yield Finding("bad", f"The run failed after {run.done}{planned} steps: {last}", "The last fault in the log.")
    elif run.state == "running":
        yield Finding("note", f"The run is going on: {run.done}{planned} steps so far.", rule)
    else:
        yield Finding("warning", f"The run stopped before its end: {run.done}{planned} steps, and no summary.", rule)
    if not run.rows:
        yield Finding("note", "No step has been trained yet.", "metrics.jsonl has no row.")


def _accuracy(run: RunFolder) -> Iterator[Finding]:
    if run.history is None or not run.history.evaluations:
        return
    records = sorted(run.history.evaluations.items())
    (start, first), (end, last) = records[0], records[-1]
    before, after = first.metrics.get("eval/accuracy", math.nan), last.metrics.get("eval/accuracy", math.nan)
    if not (math.isfinite(before) and math.isfinite(after)):
        return
    if start == end:
        yield Finding("note", f"Held-out accuracy at step {start}: {before:.3f}.", "The only evaluation in the log.")
        return
    batch = run.batch_of()
    steps = batch(end) - batch(start)
    if not (0 <= before <= 1 and 0 <= after <= 1):
        text = f"Held-out reward went from {before:.3f} to {after:.3f} in {_plural(steps, 'step')}."
        yield Finding("note", text, "First and last evaluation.")
        return
    count = max(len(last.episode_ids), 1)
    error = math.sqrt(max(before * (1 - before), 0.0) / count + max(after * (1 - after), 0.0) / count)
    moved = after - before
    clear = abs(moved) > 2 * error
    verb = ("rose" if moved > 0 else "fell") if clear else "did not clearly change:"
    greedy = ""
    if "eval/greedy" in first.metrics and "eval/greedy" in last.metrics:
        greedy = f"; greedy answers from {first.metrics['eval/greedy']:.3f} to {last.metrics['eval/greedy']:.3f}"
    yield Finding(
        ("good" if moved > 0 else "warning") if clear else "note",
        f"Held-out accuracy {verb} from {before:.3f} to {after:.3f} in {_plural(steps, 'step')}{greedy}.",
        f"First and last evaluation; clear beyond 2 standard errors of a share over {count} answers ({2 * error:.3f}).",
    )


def _reward(run: RunFolder) -> Iterator[Finding]:
    values = _series(run, "reward/mean")
    if len(values) < 2:
        return
    before, after = ends(values)
    yield Finding("note", f"Training reward went from {before:.3f} to {after:.3f}.", _ends_rule(values))


def _time(run: RunFolder) -> Iterator[Finding]:
    seconds = time_split(run)
    total = sum(seconds.values())
    if total <= 0:
        return
    largest = sorted(seconds.items(), key=lambda item: -item[1])[:3]
    shares = ", ".join(f"{value / total:.0%} {name}" for name, value in largest)
    yield Finding(
        "note", f"Time went into: {shares}, of {duration(total)}.", "Sum of time/… over the steps in metrics.jsonl."
    )


def _fates(run: RunFolder) -> Iterator[Finding]:
    if run.history is None or not run.history.fates:
        return
    count = Counter(fate.record.disposition for fate in run.history.fates)
    total = sum(count.values())
    kinds = [kind for kind in Disposition if count[kind] or kind is not Disposition.KEPT]
    parts = [f"{number(count[kind], ',d')} {kind}" for kind in kinds]
    why = ""
    reasons = run.history.reasons()
    if reasons:
        why = f" Most often not trained because: {reasons[0]['reason']} ({number(reasons[0]['count'], ',d')})."
    yield Finding(
        "note", f"Of {total:,} episodes decided: {', '.join(parts)}.{why}", "Dispositions of the surviving lineage."
    )


def _idle(run: RunFolder) -> Iterator[Finding]:
    given = [f.idle for f in run.history.fates if f.idle is not None] if run.history else []
    share = sum(given) / len(given) if given else 0.0
    if share > IDLE:
        yield Finding(
            "warning",
            f"{share:.0%} of the trained episodes had advantage 0: they cost time and taught nothing. "
            "The filter `spread` leaves such groups out.",
            f"Recorded advantages are 0 at every token in more than {IDLE:.0%} of trained episodes.",
        )


def _entropy(run: RunFolder) -> Iterator[Finding]:
    values = _series(run, "train/entropy")
    if len(values) < 5:
        return
    before, after = ends(values)
    if before > 0 and after < COLLAPSED * before:
        yield Finding(
            "warning",
            f"Entropy fell from {before:.3g} to {after:.3g} nats a token: answers to one prompt hardly differ any "
            "more, and groups without a difference teach nothing.",
            f"Below {COLLAPSED:.0%} of the start. {_ends_rule(values)}",
        )


def _dropped(run: RunFolder) -> Iterator[Finding]:
    if run.history is None:
        return
    groups = {fate.record.group_id for fate in run.history.fates}
    gone = {f.record.group_id for f in run.history.fates if f.record.reason.startswith("filter:")}
    if groups and len(gone) / len(groups) > DROPPED:
        yield Finding(
            "warning",
            f"{len(gone) / len(groups):.0%} of the groups were dropped by filters: their sampling was paid for and "
            "not used.",
            f"Groups with a disposition `filter: …` are more than {DROPPED:.0%} of all groups.",
        )


def _mismatch(run: RunFolder) -> Iterator[Finding]:
    pairs = [(row.get("mismatch/mean_abs"), row.get("gate/lag_max")) for row in run.rows]
    values = [value for value, lag in pairs if value is not None and lag == 0]
    if not values:
        return
    limits = run.config.get("limits")
    ceiling = limits.get("max_mismatch", 0.1) if isinstance(limits, dict) else 0.1
    worst, mean = max(values), fmean(values)
    rule = f"mismatch/mean_abs of steps at lag 0; warned beyond half of limits.max_mismatch = {ceiling:g}."
    if worst > ceiling / 2:
        yield Finding("warning", f"Engine and trainer disagree by up to {worst:.2g} nats a token.", rule)
    else:
        yield Finding("good", f"Engine and trainer agree: {mean:.2g} nats a token on average.", rule)


def _stale(run: RunFolder) -> Iterator[Finding]:
    masked = sum(_series(run, "gate/masked_tokens"))
    trained = sum(_series(run, "train/tokens"))
    if trained + masked and masked / (trained + masked) > STALE:
        yield Finding(
            "warning",
            f"{masked / (trained + masked):.0%} of the tokens were too old and left the loss; a larger max_lag or "
            "shorter answers would keep them.",
            f"gate/masked_tokens are more than {STALE:.0%} of masked and trained tokens.",
        )


def _outcomes(run: RunFolder) -> Iterator[Finding]:
    total = sum(_series(run, "rollout/episodes"))
    failed = sum(_series(run, "rollout/infra_failure"))
    if total and failed / total > INFRA:
        yield Finding(
            "warning",
            f"{failed:.0f} of {total:.0f} episodes were lost to infrastructure, not to the policy.",
            f"rollout/infra_failure is more than {INFRA:.0%} of rollout/episodes.",
        )
    cut, seen = _series(run, "rollout/truncated"), _series(run, "rollout/episodes")
    if cut and seen and sum(_last(seen)):
        share = sum(_last(cut)) / sum(_last(seen))
        if share > TRUNCATED:
            yield Finding(
                "warning",
                f"{share:.0%} of the answers are cut off by the token limit at the end of the run.",
                f"More than {TRUNCATED:.0%} truncated in the last tenth of the steps.",
            )


def _gradients(run: RunFolder) -> Iterator[Finding]:
    points = [(row["step"], row.get("train/grad_norm")) for row in run.rows]
    values = [value for _, value in points if value is not None]
    if len(values) < 10:
        return
    usual = median(values)
    spikes = [step for step, value in points if value is not None and usual > 0 and value > SPIKE * usual]
    if spikes:
        shown = ", ".join(map(str, spikes[:5])) + (" …" if len(spikes) > 5 else "")
        yield Finding(
            "warning",
            f"The gradient norm jumped at step {shown}.",
            f"More than {SPIKE:.0f} times its median {usual:.3g}.",
        )


def _missing(run: RunFolder) -> Iterator[Finding]:
    gaps = Counter(name for row in run.rows for name, value in row.items() if value is None)
    if gaps:
        name, count = gaps.most_common(1)[0]
        more = f" and {len(gaps) - 1} more" if len(gaps) > 1 else ""
        yield Finding(
            "warning",
            f"{name}{more} was not a finite number in {_plural(count, 'step')}.",
            "null in metrics.jsonl: NaN or infinite.",
        )


def _history(run: RunFolder) -> Iterator[Finding]:
    if run.history is None:
        return
    resumes, faults = run.history.resumes, run.history.faults
    if resumes:
        times = "once" if len(resumes) == 1 else f"{len(resumes)} times"
        yield Finding(
            "note",
            f"The run was resumed {times}; what became of {run.history.abandoned} episodes was decided again.",
            "Resume records of the log; what they took back is not in these figures.",
        )
    if faults and run.state != "failed":
        yield Finding(
            "warning",
            f"{_plural(len(faults), 'fault')} in the log, the last: {shorten(faults[-1].text, 400)}",
            "Fault records of the log.",
        )


_RULES: Sequence[Callable[[RunFolder], Iterable[Finding]]] = (
    _state, _accuracy, _reward, _time, _fates, _mismatch, _history, _idle, _entropy, _dropped, _stale, _outcomes,
    _gradients, _missing,
)  # fmt: skip


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────


def time_split(run: RunFolder) -> dict[str, float]:
    """Seconds by phase, over all steps."""
    split: dict[str, float] = {}
    for row in run.rows:
        for name, value in row.items():
            if name.startswith("time/") and value is not None:
                split[name.removeprefix("time/")] = split.get(name.removeprefix("time/"), 0.0) + value
    return split


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth."""
    return fmean(values[: _tenth(values)]), fmean(_last(values))


def _last(values: Sequence[float]) -> Sequence[float]:
    return values[-_tenth(values) :]


def _tenth(values: Sequence[float]) -> int:
    return max(1, len(values) // 10)


def _ends_rule(values: Sequence[float]) -> str:
    count = _tenth(values)
    return f"Means over the first and the last {count} steps." if count > 1 else "The first and the last step."


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _series(run: RunFolder, name: str) -> list[float]:
    return [row[name] for row in run.rows if row.get(name) is not None]
