"""Atomic checkpoints: a folder that exists is complete, a torn one is never seen.

    checkpoints/step-000050/
        manifest.json     every file with its size and digest, written last
        run.json          where everything stood: buffer, strategy, log cursor, lineage, counters
        model/            Hugging Face folder
        trainer/          optimizer, schedule, random state
        critic/           the same and the weights of the value model, where there is one

A checkpoint is written under a hidden name, flushed to disk, and renamed. Killed at any moment, the run has
either the old checkpoints or the new one as well.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from sluice.errors import CheckpointError, SluiceError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def trainer(self) -> Path:
        return self.folder / "trainer"

    @property
    def critic(self) -> Path:
        return self.folder / "critic"

    def state(self) -> dict[str, Any]:
        """What `run.json` holds."""
        return json.loads((self.folder / "run.json").read_text())

    def verify(self) -> None:
        """Compare every file with the manifest. Raises CheckpointError naming the first that differs."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            written, files = manifest["format"], manifest["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder} has no manifest that can be read: {error}",
                hint=f"remove {self.folder} to resume from the checkpoint before it",
            ) from error
        if written != FORMAT:
            raise CheckpointError(
                f"{self.folder} has checkpoint format {written}, this Sluice reads {FORMAT}",
                hint="resume with the version of Sluice that wrote it",
            )
        for name, expected in files.items():
            file = self.folder / name
            if not file.exists():
                raise CheckpointError(f"{self.folder} lacks {name}", hint="resume from an older checkpoint")
            if _digest(file) != expected["xxh3_128"]:
                raise CheckpointError(
                    f"{file} is not what was written: its digest differs from the manifest",
                    hint=f"remove {self.folder} to resume from the checkpoint before it",
                )


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, state: Mapping[str, Any], write: Mapping[str, Callable[[Path], None]]) -> Checkpoint:
        """Write a checkpoint and remove those beyond `keep`.

        Args:
            step: names it.
            state: JSON, goes to `run.json`.
            write: functions by subfolder name; each is given the folder to write into.

        Raises:
            CheckpointError: it cannot be written, for example because the disk is full. The earlier
                checkpoints and the log are untouched, also when a function raises an error of its own.
        """
        final = self._folder / f"step-{step:06d}"
        torn = self._folder / f".{final.name}.tmp"
        try:
            for left in self._folder.glob(".step-*.tmp"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            torn.mkdir(parents=True)
            for name, function in write.items():
                (torn / name).mkdir()
                function(torn / name)
            (torn / "run.json").write_text(json.dumps(state))
            files = sorted(file for file in torn.rglob("*") if file.is_file())
            listed = {
                str(file.relative_to(torn)): {"bytes": file.stat().st_size, "xxh3_128": _digest(file)} for file in files
            }
            manifest = torn / "manifest.json"
            manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": listed}, indent=1))
            for file in (*files, manifest):
                _flush(file)
            if final.exists():
                shutil.rmtree(final)
            torn.rename(final)
            _flush(self._folder)
        except Exception as error:
            shutil.rmtree(torn, ignore_errors=True)
            if isinstance(error, SluiceError):  # of who was to write: it is no matter of this folder
                raise
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {final}: {error}",
                hint="free space and resume; earlier checkpoints and every finished episode are safe",
            ) from error
        for old in self.all()[: -self._keep]:
            shutil.rmtree(old.folder)
        return Checkpoint(final, step)

    def all(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        folders = sorted(self._folder.glob("step-*")) if self._folder.exists() else []
        return [
            Checkpoint(folder, int(folder.name.removeprefix("step-")))
            for folder in folders
            if (folder / "manifest.json").exists()
        ]

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint whose files are intact, or None when there is none.

        Raises:
            CheckpointError: the newest one was damaged after it was written.
        """
        found = self.all()
        if not found:
            return None
        found[-1].verify()
        return found[-1]


def _digest(file: Path) -> str:
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
