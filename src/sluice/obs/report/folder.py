"""What a run folder holds, read as far as it can be read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from sluice.errors import LogError
from sluice.obs.report.history import History, read_history

LIVE_SECONDS = 120.0
"""A run without a summary whose log is younger than this is called running."""


@dataclass(slots=True)
class RunFolder:
    """A run as its folder tells it.

    Attributes:
        config: `config.json`; empty when it cannot be read.
        rows: `metrics.jsonl` by step, a row a batch; null stays None.
        summary: `summary.json`, None when the run has not ended.
        history: the log, folded; None when there is none that can be read.
        notices: what could not be read, for the person who looks at the page.
    """

    path: Path
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    summary: Mapping[str, Any] | None
    history: History | None
    notices: list[str] = field(default_factory=list[str])
    now: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.resolve().name)

    @property
    def planned(self) -> int | None:
        """Batches that the configuration asks for."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def done(self) -> int:
        """Batches that were trained."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def state(self) -> str:
        """`finished`, `failed`, `running` or `stopped`; the last two are told apart by the log's age."""
        history = self.history
        if self.summary is not None and self.summary.get("steps") == self.done:
            return "finished"
        if history is not None and history.failed:
            return "failed"
        alive = history is not None and self.now - history.last_at < LIVE_SECONDS
        return "running" if alive else "stopped"

    @property
    def updates(self) -> int:
        """Optimizer steps of one batch."""
        algorithm = self.config.get("algorithm")
        found = algorithm.get("updates_per_batch", 1) if isinstance(algorithm, Mapping) else 1
        return found if isinstance(found, int) and found > 0 else 1

    def batch_of(self) -> Callable[[int], int]:
        """From an optimizer step, as the log counts, to a batch, as the metrics do."""
        known = {int(row["version/step"]): int(row["step"]) for row in self.rows if _number(row.get("version/step"))}
        return lambda step: known.get(step, -(-step // self.updates))


def read_run(path: Path, *, now: float | None = None) -> RunFolder:
    """Read a run folder without disturbing whoever writes it.

    Raises:
        LogError: the folder holds neither a configuration, nor metrics, nor a log.
    """
    present = [name for name in ("config.json", "metrics.jsonl", "log") if (path / name).exists()]
    if not present:
        raise LogError(
            f"{path} is no run folder: it has no config.json, no metrics.jsonl and no log",
            hint="give the folder of a run, or its name under runs/",
        )
    run = RunFolder(path, {}, [], None, None)
    run.now = run.now if now is None else now
    run.config = _object(path / "config.json", run.notices) or {}
    run.summary = _object(path / "summary.json", [])
    run.rows = _rows(path / "metrics.jsonl", run.notices)
    if "log" in present:
        run.history = read_history(path / "log", run.notices)
    else:
        run.notices.append("There is no log folder: no episodes, and nothing about what became of them.")
    return run


def _object(path: Path, notices: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        notices.append(f"{path.name} is missing.")
        return None
    except (OSError, ValueError) as error:
        notices.append(f"{path.name} could not be read: {error}.")
        return None
    if not isinstance(content, dict):
        notices.append(f"{path.name} holds no JSON object.")
        return None
    return cast("dict[str, Any]", content)


def _rows(path: Path, notices: list[str]) -> list[dict[str, Any]]:
    """Every line that is a row, the newest of each step, in order of steps. A last line that is torn is not told."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        notices.append(f"{path.name} could not be read: {error}.")
        return []
    rows: dict[int, dict[str, Any]] = {}
    wrong: list[int] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError):
            wrong.append(number)
            continue
        if isinstance(step, int):
            rows[step] = {name: value for name, value in row.items() if value is None or _number(value)}
        else:
            wrong.append(number)
    if wrong:
        lines = ", ".join(map(str, wrong[:5])) + (" …" if len(wrong) > 5 else "")
        notices.append(f"{path.name}: {len(wrong)} lines are no rows of metrics and were left out (line {lines}).")
    return [rows[step] for step in sorted(rows)]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
