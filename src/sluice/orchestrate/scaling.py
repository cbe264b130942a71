"""The run's side of `control`: takes wishes for more or fewer servers, and says how far they are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from sluice.errors import SluiceError
from sluice.log.records import FaultRecord
from sluice.orchestrate.control import POLL_SECONDS, PROCESS, Standing, Wish
from sluice.orchestrate.journal import Journal
from sluice.rollout.engines.sglang.elastic import Elastic


@dataclass(slots=True)
class Scaler:
    """Watches the folder of a run.

    A run begins with the recipe's number. A wish counts for the process that it was addressed to: one that goes on
    from its checkpoint by itself keeps it, a resumed one does not.

    Attributes:
        folder: of the run.
        elastic: its servers.
        journal: newcomers that do not come up are faults in the log.
        tell: told what is wanted, in a line each.
    """

    folder: Path
    elastic: Elastic
    journal: Journal
    tell: Callable[[str], None]
    _taken: str = ""
    _refused: str = ""
    _said: Standing | None = None
    _logged: list[str] = field(default_factory=list[str])

    def open(self, stack: AsyncExitStack) -> None:
        """Begin to watch; `stack` ends it."""
        wish = Wish.read(self.folder)
        if wish is not None and wish.process != PROCESS:
            Wish.remove(self.folder)
        self.look()
        stack.callback(Standing.remove, self.folder)
        watch = asyncio.create_task(self._watch(), name="scaler")
        stack.callback(watch.cancel)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                self.look()
            except OSError as error:  # the folder cannot be written: whoever asks is told by the deadline
                self.tell(f"the servers' state cannot be written: {error}")
                await asyncio.sleep(30 * POLL_SECONDS)

    def look(self) -> None:
        """Take a wish that is new, and write what has changed."""
        wish = Wish.read(self.folder)
        if wish is not None and wish.id != self._taken and wish.process == PROCESS:
            self._take(wish)
        faults = list(self.elastic.faults)
        for what in faults[len(self._logged) :]:
            self.journal.write_now(FaultRecord(what, "servers"))
        self._logged = faults
        now = self.elastic.strength
        said = Standing(
            PROCESS, os.getpid(), self._taken, self._refused, now.wanted, now.serving, now.starting, now.leaving,
            now.limit, tuple(faults),
        )  # fmt: skip
        if said != self._said:
            said.write(self.folder)
            self._said = said

    def _take(self, wish: Wish) -> None:
        self._taken, self._refused = wish.id, ""
        self.tell(f"servers: {wish.servers} are wanted")
        try:
            self.elastic.scale(wish.servers)
            self._logged = []
        except SluiceError as error:
            self._refused = str(error.args[0])
            self.tell(f"servers: {self._refused}")
