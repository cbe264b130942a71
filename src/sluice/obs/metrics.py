"""Metrics of a run: one row a batch, to `metrics.jsonl` and to TensorBoard.

`metrics.jsonl` describes the surviving lineage: on resume the rows of abandoned steps are cut off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sluice.errors import LogError
from sluice.obs.atomic import write_atomic
from sluice.obs.format import finite


class MetricSink(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep a row, durable against the death of this process."""
        ...

    def truncate_after(self, step: int) -> None:
        """Forget rows of later steps: a resumed run makes them again. -1 forgets all."""
        ...

    def close(self) -> None:
        """Write out what is held. May be called twice."""
        ...


class JsonlSink:
    """Appends `{"step": …, "reward/mean": …}` to a file, flushed a line.

    A number that is not finite becomes null, so that the key is kept and the file stays JSON. A last line
    that a killed process left torn is cut off when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = _whole_lines(path)
        if path.exists() and len(whole) != path.stat().st_size:
            write_atomic(path, whole)
        self._file = path.open("ab")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row."""
        row = {"step": step} | {name: finite(float(value)) for name, value in metrics.items()}
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Rewrite the file without rows of later steps.

        Raises:
            LogError: a line before the last one is no row.
        """
        self._file.close()
        rows = read_metrics(self._path)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) != len(rows):
            lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in kept]
            write_atomic(self._path, b"".join(lines))
        self._file = self._path.open("ab")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Writes TensorBoard event files; `reward/mean` and `reward/std` share a section."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._folder = folder
        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to every curve, and flush."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def truncate_after(self, step: int) -> None:
        """Begin a new event file that tells TensorBoard to hide later steps of the older ones."""
        self._writer.close()
        self._writer = self._make(str(self._folder), purge_step=step + 1)

    def close(self) -> None:
        """Write the rest."""
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, oldest first; a torn last line is left out, null stays None.

    Raises:
        LogError: a line before the last one is no row.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise LogError(
                f"{path}:{number} is no row of metrics: {line[:60]!r}",
                hint="the file was edited or its disk is failing; move it away to go on without its history",
            ) from error
        if not isinstance(step, int):
            raise LogError(f"{path}:{number} has step {step!r}", hint="move the file away to go on without it")
        rows.append(row)
    return rows


def _whole_lines(path: Path) -> bytes:
    """The content up to the last line end; a last line that is complete JSON but lacks it is torn, too."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]
