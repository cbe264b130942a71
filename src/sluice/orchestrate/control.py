"""How many servers a run should have: a wish that is laid into its folder, and what the run says to it.

    sluice scale ──► control/wish.json     how many, and to which process
             ◄────── control/servers.json  what was taken, how many are wanted, serving, starting, leaving

Both files are replaced as a whole. Whoever may write in the folder may ask; there is no port to guard.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from sluice.config.run import RunConfig
from sluice.errors import ConfigError, EngineError
from sluice.log.lock import holder

FOLDER = "control"
POLL_SECONDS = 0.2
PROCESS = secrets.token_hex(8)
"""Names this process: its number alone may come again."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A small file, replaced as a whole."""

    FILE: ClassVar[str]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """From the run folder; None when there is none, or none that can be read."""
        try:
            found: Any = json.loads((folder / FOLDER / cls.FILE).read_text(encoding="utf-8"))
            return cls(**{each.name: found[each.name] for each in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Into the run folder."""
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        torn = place / f".{self.FILE}.{secrets.token_hex(4)}"
        torn.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        torn.replace(place / self.FILE)

    @classmethod
    def remove(cls, folder: Path) -> None:
        (folder / FOLDER / cls.FILE).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Wish(Stored):
    """So many servers, asked of a process under an id of its own."""

    FILE: ClassVar[str] = "wish.json"

    id: str
    process: str
    servers: int


@dataclass(frozen=True, slots=True)
class Standing(Stored):
    """The servers of a run that lives.

    Attributes:
        process: names the run's process.
        pid: its number.
        taken: id of the wish that it has taken last; empty for none.
        refused: why it did not; empty when it did.
        wanted, serving, starting, leaving: servers, see `Strength`.
        limit: at most so many have a device; None where none is needed.
        faults: why newcomers did not come up.
    """

    FILE: ClassVar[str] = "servers.json"

    process: str
    pid: int
    taken: str
    refused: str
    wanted: int
    serving: int
    starting: int
    leaving: int
    limit: int | None
    faults: Sequence[str] = ()

    @property
    def settled(self) -> bool:
        return not self.starting and not self.leaving

    def __str__(self) -> str:
        parts = [f"{self.serving} of {self.wanted} servers serve"]
        parts += [
            f"{count} {word}" for count, word in ((self.starting, "starting"), (self.leaving, "leaving")) if count
        ]
        return "\n".join([", ".join(parts), *self.faults])


def refuse_fixed(config: RunConfig) -> None:
    """ConfigError when the number of servers of such a run cannot change while it runs."""
    rollout, why, hint = config.rollout, "", ""
    if config.replay is not None:
        why = "it trains on recorded episodes and has no servers"
    elif rollout.engine == "embedded" and not rollout.embedded.servers:
        why, hint = "its engine is in the run's own process", "resume it with rollout.embedded.servers=1 or more"
    elif rollout.engine not in ("embedded", "sglang") or (rollout.engine == "sglang" and rollout.sglang.urls):
        why, hint = "its servers were not started by it", "start and stop them where they were started"
    elif config.placement.colocate:
        why, hint = "its servers sit on the devices of the trainer's ranks", "resume it with --no-colocate"
    elif rollout.engine == "sglang" and not rollout.sglang.uniform:
        why, hint = "its servers are not of one kind, on a host each", "rollout.sglang.groups: one regular group"
    if why:
        raise ConfigError(f"the number of servers of this run stays as it is: {why}", hint=hint)


def standing(folder: Path) -> Standing:
    """What the run in a folder says of its servers.

    Raises:
        ConfigError: no run lives there, or the number of its servers is fixed.
        EngineError: it has not started its servers yet.
    """
    saved = folder / "config.json"
    if not saved.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.json")
    who = holder(folder / "log")
    if who is None:
        raise ConfigError(f"no run is under way in {folder}", hint="start or resume it first")
    refuse_fixed(RunConfig.model_validate_json(saved.read_text(encoding="utf-8")))
    found = Standing.read(folder)
    if found is None or f"process {found.pid} " not in f"{who} ":
        raise EngineError(f"{who} has not started its servers yet", hint="ask again when it has")
    return found


def scale(folder: Path, servers: int, *, seconds: float) -> Standing:
    """Ask the run in a folder for so many servers, and wait until it has them.

    Args:
        seconds: how long to wait. Afterwards the run goes on with it by itself: see `Standing.settled`.

    Raises:
        ConfigError: see `standing`; or there can be no such number. Nothing was written then.
        EngineError: the run did not take the wish, ended meanwhile, or a newcomer did not come up.
    """
    before = standing(folder)
    if servers < 1:
        raise ConfigError(f"{servers} servers cannot serve", hint="at least one stays")
    if before.limit is not None and servers > before.limit:
        raise ConfigError(
            f"{servers} servers have no devices: there are devices for {before.limit}",
            hint="accelerators that the run sees, without those of its trainer, count",
        )
    wish = Wish(secrets.token_hex(8), before.process, servers)
    wish.write(folder)
    found = _wait(folder, lambda now: now.taken == wish.id and now.settled, seconds)
    if found.taken != wish.id:
        raise EngineError(
            f"the run has not taken the wish within {seconds:g} s",
            hint="the wish stays there, and is taken when the run comes to it",
        )
    if found.refused:
        raise EngineError(found.refused)
    if found.faults:
        raise EngineError(str(found), hint=f"see {folder / 'engines'}; the run goes on. Ask again to try again")
    return found


def _wait(folder: Path, holds: Callable[[Standing], bool], seconds: float) -> Standing:
    deadline = time.monotonic() + seconds
    while True:
        found = standing(folder)
        if holds(found) or time.monotonic() >= deadline:
            return found
        time.sleep(POLL_SECONDS)
