"""From run folders to the page's data, within bounds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sluice import __version__
from sluice.config.dump import flatten
from sluice.errors import ConfigError, LogError
from sluice.log.reader import LogReader
from sluice.log.records import Entry
from sluice.obs.format import duration, finite
from sluice.obs.report.choose import DEFAULT_EPISODES, Chapter, chapters, in_turns
from sluice.obs.report.compact import Compact, Spell
from sluice.obs.report.findings import findings, time_split
from sluice.obs.report.folder import RunFolder
from sluice.obs.report.history import Fate, History
from sluice.obs.report.page import render

EPISODE_BYTES = 8 << 20
"""All embedded episodes together; what does not fit is left out and said."""
POINTS = 1_000
"""Points of a curve; a longer run is shown by the means of equal stretches of steps."""
_FATES = ("trained", "dropped", "excluded", "kept")
_EVENTS = 200
_CONFIG_LENGTH = 2_000


@dataclass(frozen=True, slots=True)
class Wish:
    """What of the episodes goes in.

    Attributes:
        steps: batches; None takes some of them, first and last among them.
        episodes: at most so many, over all runs.
    """

    steps: Collection[int] | None = None
    episodes: int = DEFAULT_EPISODES


def wish(steps: str | None, episodes: int | None) -> Wish:
    """A wish as the command line gives it: `1,20,55`. Raises ConfigError for what is no list of steps."""
    chosen = DEFAULT_EPISODES if episodes is None else episodes
    if steps is None:
        return Wish(None, chosen)
    words = [word.strip() for word in steps.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--steps {steps}: not a list of steps", hint="numbers with commas: --steps 1,20,55")
    return Wish(frozenset(map(int, words)), chosen)


def build(runs: Sequence[RunFolder], spell: Callable[[RunFolder], Spell | None], wanted: Wish | None = None) -> str:
    """The page about one run or several.

    Args:
        spell: makes what spells a run's tokens; asked once a run that has episodes to show.
    """
    asked = wanted or Wish()
    share = Wish(asked.steps, -(-asked.episodes // len(runs)))
    data = {
        "made": time.time(),
        "sluice": __version__,
        "runs": [_run(run, spell, share, EPISODE_BYTES // len(runs)) for run in runs],
    }
    names = [run["name"] for run in data["runs"]]
    for run, made in zip(runs, data["runs"], strict=True):
        if names.count(run.name) > 1:
            made["name"] = f"{run.name} ({run.path})"
    title = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return render(finite(data), title=f"{title} · Sluice report")


def _run(run: RunFolder, spell: Callable[[RunFolder], Spell | None], wish: Wish, budget: int) -> dict[str, Any]:
    steps, metrics, stride = _curves(run.rows)
    episodes = _episodes(run, spell, wish, budget) if run.history is not None else None
    return {
        "name": run.name,
        "state": run.state,
        "facts": _facts(run),
        "findings": [finding._asdict() for finding in findings(run)],
        "steps": steps,
        "metrics": metrics,
        "stride": stride,
        "updates": run.updates,
        "evaluations": _evaluations(run),
        "time": time_split(run),
        **_fates(run),
        "events": _events(run),
        "config": _flat(run.config),
        "episodes": episodes,
        "notices": run.notices,
    }


# ── curves ──────────────────────────────────────────────────────────────────────────────────────────────


def _curves(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[float | None]], int]:
    """Steps, a column a metric with None where a row lacks it, and how many steps a point stands for."""
    stride = max(1, math.ceil(len(rows) / POINTS))
    stretches = [rows[start : start + stride] for start in range(0, len(rows), stride)]
    names = dict.fromkeys(name for row in rows for name in row if name != "step" and not name.startswith("eval/"))
    columns = {name: [_mean([row.get(name) for row in stretch]) for stretch in stretches] for name in names}
    return [int(stretch[-1]["step"]) for stretch in stretches], columns, stride


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _short(math.fsum(known) / len(known)) if known else None


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _evaluations(run: RunFolder) -> dict[str, Any]:
    """From the log, which has the one before the first step too; else from the metrics."""
    if run.history is not None and run.history.evaluations:
        batch = run.batch_of()
        found = {batch(step): dict(one.metrics) for step, one in sorted(run.history.evaluations.items())}
    else:
        rows = {row["step"]: {k: v for k, v in row.items() if k.startswith("eval/")} for row in run.rows}
        found = {step: metrics for step, metrics in rows.items() if metrics}
    names = dict.fromkeys(name for metrics in found.values() for name in metrics)
    return {
        "steps": list(found),
        "metrics": {name: [metrics.get(name) for metrics in found.values()] for name in names},
    }


# ── what became of the episodes ─────────────────────────────────────────────────────────────────────────


def _fates(run: RunFolder) -> dict[str, Any]:
    if run.history is None:
        return {"fates": None, "reasons": []}
    batch = run.batch_of()
    placed = [(batch(fate.step), fate) for fate in run.history.fates if fate.step is not None]
    steps = sorted({step for step, _ in placed})
    stride = max(1, math.ceil(len(steps) / POINTS))
    column = {step: index // stride for index, step in enumerate(steps)}
    counts = {kind: [0.0] * math.ceil(len(steps) / stride) for kind in _FATES}
    masked = [0.0] * math.ceil(len(steps) / stride)
    for step, fate in placed:
        counts[str(fate.record.disposition)][column[step]] += 1 / stride
        masked[column[step]] += fate.record.masked_tokens / stride
    reasons = [
        {**row, "first": None if row["first"] is None else batch(row["first"]),
         "last": None if row["last"] is None else batch(row["last"])}
        for row in run.history.reasons()
    ]  # fmt: skip
    shown = [steps[min(start + stride, len(steps)) - 1] for start in range(0, len(steps), stride)]
    return {
        "fates": {"steps": shown, "counts": counts, "masked": masked, "stride": stride},
        "reasons": reasons[:50],
        "reasons_left_out": max(0, len(reasons) - 50),
    }


def _events(run: RunFolder) -> list[dict[str, Any]]:
    if run.history is None:
        return []
    batch = run.batch_of()
    told = [event for event in run.history.events if event.kind != "checkpoint"]
    return [
        {"kind": event.kind, "step": batch(event.step), "at": event.at, "text": event.text[:2_000]}
        for event in told[-_EVENTS:]
    ]


# ── episodes ────────────────────────────────────────────────────────────────────────────────────────────


def _episodes(
    run: RunFolder, spell: Callable[[RunFolder], Spell | None], wish: Wish, budget: int
) -> dict[str, Any] | None:
    assert run.history is not None  # asked for a run with a log only
    found = chapters(run.history, run.batch_of(), wish.steps)
    absent = sorted(set(wish.steps or ()) - {chapter.step for chapter in found if chapter.kind != "reason"})
    if absent:
        run.notices.append(f"No episode was trained or evaluated at step {', '.join(map(str, absent[:20]))}.")
    wanted = list(in_turns(found, wish.episodes))
    if not wanted:
        return None
    entries = _entries(run, [id for _, ids in wanted for id in ids])
    compact = Compact(spell(run))
    fates = _fate_of(run.history, entries)
    packed: list[dict[str, Any]] = []
    places: dict[int, list[int]] = {id(chapter): [] for chapter in found}
    too_large = 0
    for chapter, ids in wanted:
        for name in ids:
            one = compact.episode(entries.get(name, []), fates.get(name))
            if one is None:
                continue
            size = len(json.dumps(one))
            if size > budget:
                too_large += 1
                continue
            budget -= size
            places[id(chapter)].append(len(packed))
            packed.append(one)
    shown = [chapter for chapter in found if places[id(chapter)]]
    total = len(run.history.fates) + sum(chapter.total for chapter in found if chapter.kind == "eval")
    return {
        "chapters": [_chapter(chapter, places[id(chapter)]) for chapter in shown],
        "episodes": packed,
        "prompts": compact.prompts,
        "tokens": compact.vocabulary(),
        "total": total,
        "too_large": too_large,
    }


def _chapter(chapter: Chapter, places: list[int]) -> dict[str, Any]:
    return {"kind": chapter.kind, "step": chapter.step, "episodes": places, "of": chapter.total}


def _fate_of(history: History, names: Collection[str]) -> dict[str, Fate]:
    return {fate.record.episode_id: fate for fate in history.fates if fate.record.episode_id in names}


def _entries(run: RunFolder, names: Sequence[str]) -> dict[str, list[Entry]]:
    """Everything about these episodes; one that lies in a damaged part of the log is left out, and said."""
    reader = LogReader(run.path / "log")
    try:
        return reader.about_all(names)
    except LogError:
        found: dict[str, list[Entry]] = {}
        for name in names:
            try:
                found[name] = reader.about(name)
            except LogError:
                continue
        if len(found) < len(names):
            run.notices.append(f"{len(names) - len(found)} episodes could not be read: the log is damaged there.")
        return found


# ── facts ───────────────────────────────────────────────────────────────────────────────────────────────


def _facts(run: RunFolder) -> list[list[str]]:
    config, history = run.config, run.history
    flat = _flat(config)
    planned = f" of {run.planned}" if run.planned is not None else ""
    rows = [["steps", f"{run.done}{planned}"], ["folder", str(run.path)]]
    if flat.get("model.path"):
        rows.append(["model", str(flat["model.path"])])
    elif flat.get("model.scratch.architecture.model_type"):
        rows.append(["model", f"{flat['model.scratch.architecture.model_type']}, from scratch"])
    for label, key in (
        ("algorithm", "algorithm.type"), ("engine", "rollout.engine"), ("source", "data.train.type"),
        ("data set", "data.train.dataset"), ("max lag", "data.gate.max_lag"), ("groups a step", "groups_per_step"),
        ("seed", "seed"),
    ):  # fmt: skip
        if flat.get(key) is not None:
            rows.append([label, str(flat[key])])
    if history is not None:
        rows += [
            ["Sluice", ", ".join(history.sluice_versions) or "-"],
            ["versions published", str(len(history.versions))],
            ["started", _clock(history.first_at)],
            ["last record", f"{_clock(history.last_at)}, {duration(history.last_at - history.first_at)} later"],
            ["resumes, faults", f"{len(history.resumes)}, {len(history.faults)}"],
        ]
    return rows


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys; a list of plain values is one value, as text."""

    def folded(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): folded(each) for name, each in value.items()}
        if isinstance(value, list):
            if any(isinstance(each, dict | list) for each in value):
                return [folded(each) for each in value]
            return json.dumps(value, ensure_ascii=False)[:_CONFIG_LENGTH]
        return value

    return flatten(folded(config)) if config else {}


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
