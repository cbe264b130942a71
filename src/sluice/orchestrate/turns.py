"""The turns of episodes that are under way, in a log of their own beside the run's: `RUN/turns/`.

The run's log holds finished episodes for good. A turn is worth something until its episode is finished, so files all of
whose episodes are in the run's log are removed, and what is left is about as large as what is under way. Losing it
costs time, never an episode: a log of turns that cannot be read is removed, and what it held is drawn again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sluice.config.data import OnStale, Order
from sluice.data.gate import Gate
from sluice.errors import LogError, WeightsError
from sluice.log.reader import LogReader
from sluice.log.records import Kind, TurnRecord, keys
from sluice.log.retention import drop_through
from sluice.log.writer import LogWriter
from sluice.orchestrate.journal import Journal
from sluice.weights.lineage import Lineage

ROTATE_BYTES = 16 << 20
"""Size of a file: what is removed at a time."""
_EPISODES = 64
"""Finished episodes between two looks at what can be removed."""


class TurnLog:
    """Keeps turns, and gives those of an earlier process back. See `rollout.engines.continuing.Turns`.

    Args:
        folder: made if need be.
        gate: of the run, with its lineage: which turns are young enough to go on from.
        tell: shown to the person who watches.
    """

    def __init__(
        self,
        folder: Path,
        *,
        gate: Gate,
        lineage: Lineage,
        tell: Callable[[str], None],
        rotate_bytes: int = ROTATE_BYTES,
    ) -> None:
        self._folder, self._tell = folder, tell
        self.may_use, self.bound = young_enough(gate, lineage), promise(gate)
        self._found: dict[str, dict[str, TurnRecord]] = {}
        self._first: dict[str, int] = {}  # a record of each unfinished episode, none of its own is older
        self._finished = 0
        self._rotate_bytes = rotate_bytes
        try:
            self._writer = LogWriter(folder, rotate_bytes=rotate_bytes)
        except LogError as error:
            self._writer = self._begin_anew(error)
        self._journal = Journal(self._writer)

    def recall(self, finished: Collection[str], first_group: int) -> int:
        """Look for turns of unfinished episodes.

        Args:
            finished: ids of episodes that the run's log has, from this group on; before it all are over.

        Returns:
            How many turns there are.
        """
        try:
            for entry in LogReader(self._folder).read(kinds=(Kind.TURN,)):
                record = entry.record
                assert isinstance(record, TurnRecord)
                if record.episode_id not in finished and (keys(record)[1] or 0) >= first_group:
                    self._found.setdefault(record.episode_id, {})[record.asked] = record  # the newest counts
                    self._first.setdefault(record.episode_id, entry.seq)
        except LogError as error:  # what came before it is used, and lost when this process is killed
            self._writer.close()
            self._writer = self._begin_anew(error)
            self._journal = Journal(self._writer)
            self._first.clear()
        self._drop()
        return sum(map(len, self._found.values()))

    async def keep(self, records: Sequence[TurnRecord]) -> None:
        """Append; returns when they are durable. Raises LogError."""
        for record in records:
            self._first.setdefault(record.episode_id, self._writer.cursor + 1)
        await self._journal.write(*records)

    def take(self, episode_id: str) -> dict[str, TurnRecord]:
        """What an earlier process has kept of an episode, by `asked`; nothing when it is called again."""
        return self._found.pop(episode_id, {})

    def over(self, episode_id: str) -> None:
        """The episode is in the run's log."""
        self._first.pop(episode_id, None)
        self._finished += 1
        if self._finished % _EPISODES == 0:
            self._drop()

    def close(self) -> None:
        """Let the folder go."""
        self._writer.close()

    def _drop(self) -> None:
        """Remove files that no unfinished episode has a turn in."""
        drop_through(self._folder, min(self._first.values(), default=self._writer.cursor + 1) - 1)

    def _begin_anew(self, error: LogError) -> LogWriter:
        self._tell(f"turns of unfinished episodes cannot be read, and are drawn again: {error.args[0]}")
        shutil.rmtree(self._folder)
        return LogWriter(self._folder, rotate_bytes=self._rotate_bytes)


def young_enough(gate: Gate, lineage: Lineage) -> Callable[[TurnRecord], bool]:
    """Whether a turn may be gone on from, by the versions that drew it.

    None may lag more than `max_lag` behind the weights in use. Where the gate waits, all must be ancestors of these,
    and the turn is trained by the time that the gate promised when it was drawn: under a tighter promise since then,
    only turns of the weights in use can keep it.
    """
    own = promise(gate)

    def may_use(record: TurnRecord) -> bool:
        versions = {span.version for span in record.turn.spans}
        try:
            lag = max(map(lineage.lag, versions), default=0)
        except WeightsError:  # published, and lost with the newest records of the run's log
            return False
        if gate.config.effective_on_stale is not OnStale.WAIT:
            return lag <= gate.config.max_lag
        kept = record.bound is not None and own is not None and record.bound <= own
        return all(map(lineage.in_line, versions)) and (lag == 0 or (kept and lag <= gate.config.max_lag))

    return may_use


def promise(gate: Gate) -> int | None:
    """Steps of lag that no group exceeds when its turn comes; None when one may be overtaken."""
    in_order = gate.config.effective_order is Order.DISPATCH
    return gate.pacing.batches_ahead * gate.updates if in_order else None
