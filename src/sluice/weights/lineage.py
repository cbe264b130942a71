"""Lineage: which versions descend from which, and how far apart two of them are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sluice.errors import WeightsError
from sluice.types import Version


@dataclass(frozen=True, slots=True)
class Born:
    """A version that was published: its parent (None for the first) and the checksum of its bytes."""

    version: Version
    parent: Version | None
    checksum: str


class Lineage:
    """Every version ever published by a run, abandoned ones included, and the one in use."""

    def __init__(self, born: Iterable[Born] = ()) -> None:
        self._born: dict[Version, Born] = {}
        for entry in born:
            self._born.setdefault(entry.version, entry)
        self.current: Version | None = None

    def name(self, step: int, parent: Version | None, checksum: str) -> Version:
        """What weights of `step` with these bits are called, and remember them.

        A step that was published before keeps its attempt when parent and checksum are equal; other bits
        are a new attempt.
        """
        attempts = [entry for version, entry in self._born.items() if version.step == step]
        for entry in attempts:
            if (entry.parent, entry.checksum) == (parent, checksum):
                self.current = entry.version
                return entry.version
        version = Version(step, 1 + max((entry.version.attempt for entry in attempts), default=-1))
        self._born[version] = Born(version, parent, checksum)
        self.current = version
        return version

    def rewind(self, version: Version) -> None:
        """Stand just before `version`: publishing its bits again gives it back its name."""
        self.current = self._born[version].parent if version in self._born else None

    def ancestry(self, version: Version) -> list[Version]:
        """The version, its parent, and so on to the first. Raises WeightsError for an unknown one."""
        return list(self._line(version))

    def _line(self, version: Version) -> Iterator[Version]:
        at: Version | None = version
        while at is not None:
            if at not in self._born:
                raise WeightsError(f"version {at} was never published by this run")
            yield at
            at = self._born[at].parent

    def lag(self, version: Version) -> int:
        """Optimizer steps from `version` to the one in use, along the lineage.

        For a version on an abandoned branch the steps are counted from where the branches parted, and at
        least one: such weights were never those in use. The line is followed no further than it must be: a run
        that has published ten thousand versions asks for the lag of every episode.
        """
        if self.current is None:
            raise WeightsError("no version is in use yet")
        if version == self.current:
            return 0
        if self._follows(self.current, version):
            return self.current.step - version.step
        line = set(self._line(self.current))
        common = next(at for at in self._line(version) if at in line)
        return max(1, self.current.step - common.step)

    def _follows(self, later: Version, version: Version) -> bool:
        """Whether `version` is `later` or an ancestor of it. A parent's step is never above its child's."""
        line = itertools.takewhile(lambda at: at.step >= version.step, self._line(later))
        return any(at == version for at in line)

    def in_line(self, version: Version) -> bool:
        """Whether `version` is the one in use or an ancestor of it."""
        return self.current is not None and self._follows(self.current, version)

    def state_dict(self) -> dict[str, Any]:
        return {
            "current": str(self.current) if self.current else None,
            "born": [
                [str(entry.version), str(entry.parent) if entry.parent else None, entry.checksum]
                for entry in self._born.values()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's versions, besides those already known (read from the log)."""
        for version, parent, checksum in state["born"]:
            born = Born(Version.parse(version), Version.parse(parent) if parent else None, checksum)
            self._born.setdefault(born.version, born)
        self.current = Version.parse(state["current"]) if state["current"] else None
