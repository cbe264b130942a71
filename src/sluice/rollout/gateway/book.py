"""The book of sessions: who is open, by id and by key; what is left of those that ended."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from sluice.rollout.chat.base import ChatMessage
from sluice.rollout.gateway.errors import Busy, SessionError, UnknownSession
from sluice.rollout.gateway.keys import digest, new_session_key
from sluice.rollout.session import Session
from sluice.types import Episode

REMEMBERED = 4_096
"""Ended sessions whose summary is kept."""


@dataclass(slots=True, eq=False)
class Link:
    """One answer of the responses API: what came in since `previous`, and the answer."""

    previous: Link | None
    messages: tuple[ChatMessage, ...]

    def history(self) -> tuple[ChatMessage, ...]:
        """Everything up to this answer."""
        parts, link = list[tuple[ChatMessage, ...]](), self
        while link is not None:
            parts.append(link.messages)
            link = link.previous
        return tuple(message for part in reversed(parts) for message in part)


@dataclass(slots=True, eq=False)
class Entry:
    """An open session.

    Attributes:
        key_hash: SHA-256 of its key.
        opened: seconds since the epoch.
        leased: it came over HTTP, from the desk; otherwise from a runner in this process.
        rewards: given so far, by name.
        responses: answers of the responses API by id.
        alarmed: its first mismatch was logged.
    """

    session: Session
    key_hash: bytes
    leased: bool
    opened: float = field(default_factory=time.time)
    rewards: dict[str, float] = field(default_factory=dict[str, float])
    responses: dict[str, Link] = field(default_factory=dict[str, Link])
    alarmed: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """What is remembered of a session that ended."""

    id: str
    group_id: str
    task: str
    outcome: str
    reason: str
    opened: float
    ended: float
    counters: dict[str, int]
    key_hash: bytes


class Book:
    """Sessions of one gateway.

    Args:
        most: open sessions; one more is refused.
        retry_after: seconds that a refused one is told to wait.
    """

    def __init__(self, most: int, retry_after: int) -> None:
        self._most, self._retry_after = most, retry_after
        self._open: dict[str, Entry] = {}
        self._keys: dict[bytes, Entry] = {}
        self._ended: OrderedDict[str, Ended] = OrderedDict()
        self._ended_keys: dict[bytes, str] = {}
        self._unclaimed: dict[str, Episode] = {}
        self.totals: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._open.values()))

    def ended(self) -> list[Ended]:
        """Those that ended, the latest first."""
        return list(reversed(self._ended.values()))

    def check_room(self) -> None:
        """Raises Busy when no further session may be opened."""
        if len(self._open) >= self._most:
            error = Busy(f"{self._most} sessions are open, and no more may be", hint="finish some, or come back later")
            error.retry_after = self._retry_after
            raise error

    def add(self, session: Session, *, leased: bool) -> tuple[Entry, str]:
        """Enter a session. Returns its entry and the key, which is kept nowhere."""
        if session.id in self._open:
            raise SessionError(f"session {session.id} is open already", hint="every episode has one session")
        key = new_session_key()
        entry = Entry(session, digest(key), leased)
        self._open[session.id] = entry
        self._keys[entry.key_hash] = entry
        return entry, key

    def by_key(self, key: str) -> Entry | Ended | None:
        """The session that a key opens, open or ended."""
        hashed = digest(key)
        if (entry := self._keys.get(hashed)) is not None:
            return entry
        return self._ended.get(self._ended_keys.get(hashed, ""))

    def by_id(self, id: str) -> Entry:
        """An open session. Raises UnknownSession."""
        entry = self._open.get(id)
        if entry is None:
            was = f"has ended ({self._ended[id].outcome})" if id in self._ended else "is not known"
            raise UnknownSession(f"session {id[:80]!r} {was}", hint="GET /sessions lists them")
        return entry

    def close(self, entry: Entry, episode: Episode, *, keep: bool) -> None:
        """Take a session out. With `keep` its episode waits for `claim`."""
        id, counters = episode.id, entry.session.counters()
        del self._open[id], self._keys[entry.key_hash]
        self._ended[id] = Ended(
            id, episode.group_id, episode.prompt.task, episode.outcome.value, episode.reason, entry.opened, time.time(),
            counters, entry.key_hash,
        )  # fmt: skip
        self._ended_keys[entry.key_hash] = id
        self.totals.update(counters)
        self.outcomes[episode.outcome.value] += 1
        if keep:
            self._unclaimed[id] = episode
        while len(self._ended) > REMEMBERED:
            _, oldest = self._ended.popitem(last=False)
            self._ended_keys.pop(oldest.key_hash, None)

    def claim(self, id: str) -> Episode | None:
        """The episode of a session that ended by itself, once."""
        return self._unclaimed.pop(id, None)
