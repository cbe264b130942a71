"""Checkpoints beside the loop, one at a time: it waits for a copy in host memory, a thread does the rest.

    snapshot ─► begin ──► the loop goes on ─────────────────► settle ─► the next snapshot
                  └─► [thread: write ─► digest ─► flush ─► rename ─► CheckpointRecord]

`settle` waits for the thread and raises what failed there. A checkpoint that was begun is finished or leaves nothing,
also when the run ends by an error: `close` waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from typing import Any

from sluice.checkpoint.store import CheckpointStore
from sluice.errors import LogError
from sluice.log.records import CheckpointRecord, FaultRecord
from sluice.orchestrate.journal import Journal
from sluice.train.base import Critic, Trainer, Writer


def snapshots(trainer: Trainer, critic: Critic | None, *, copy: bool) -> dict[str, Writer]:
    """What writes each subfolder of a checkpoint; see `Trainer.snapshot`."""
    taken = trainer.snapshot(copy=copy)
    own = {} if critic is None else {"critic": critic.snapshot(copy=copy)}
    return {"model": taken.model, "trainer": taken.state, **own}


class Saver:
    """Writes the checkpoints of a run.

    Args:
        store: where they go.
        journal: told when one exists.
        background: the loop goes on meanwhile, and each is a copy; else `begin` returns when it is written.
        apart: engine or trainer compute elsewhere, see `Beside`: episodes go on while the loop waits. Else waiting
            holds the event loop up, so that what is sampled in a step does not depend on how long a disk takes.
    """

    def __init__(self, store: CheckpointStore, journal: Journal, *, background: bool, apart: bool) -> None:
        self.background = background
        self._store, self._journal, self._apart = store, journal, apart
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._seconds: dict[str, float] = {}

    async def begin(
        self, step: int, state: Mapping[str, Any], write: Mapping[str, Writer], record: CheckpointRecord
    ) -> None:
        """Start to write a checkpoint; see `CheckpointStore.save`. The one before must be settled.

        Args:
            record: goes to the log when the checkpoint exists.
        """
        assert self._writing is None  # two at a time would be two copies in memory
        self._writing = self._thread.submit(self._write, step, deepcopy(state), write, record)
        if not self.background:
            await self.settle()

    async def settle(self) -> None:
        """Wait for the checkpoint that is being written, if one is.

        Raises:
            CheckpointError: it cannot be written. Earlier checkpoints and the log are untouched.
            LogError: it was, and the log cannot say so.
            RanksLost: the rank that held it is gone.
        """
        if self._writing is None:
            return
        if self._apart:
            with suppress(Exception):  # raised below
                await asyncio.shield(asyncio.wrap_future(self._writing))
        writing, self._writing = self._writing, None
        writing.result()

    async def look(self) -> None:
        """Raise what `settle` would if the writing has ended; else let it go on."""
        if self._writing is not None and self._writing.done():
            await self.settle()

    def figures(self) -> dict[str, float]:
        """For the metrics of a batch: what was written since they were asked for."""
        found, self._seconds = self._seconds, {}
        return found

    def close(self) -> None:
        """Wait for the thread and end it. A failure that nobody was told of goes to the log. Harmless when repeated."""
        self._thread.shutdown()
        writing, self._writing = self._writing, None
        error = writing.exception() if writing is not None else None
        if error is not None:
            with suppress(LogError):  # something else ended the run, and that is raised
                self._journal.write_now(FaultRecord(f"{type(error).__name__}: {error}", "the checkpoint under way"))

    def _write(
        self, step: int, state: Mapping[str, Any], write: Mapping[str, Writer], record: CheckpointRecord
    ) -> None:
        began = time.perf_counter()
        self._store.save(step, state, write)
        self._journal.write_now(record)
        self._seconds = {"checkpoint/write_seconds": time.perf_counter() - began}
