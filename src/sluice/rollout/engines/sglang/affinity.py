"""Affinity with a load ceiling: which routing key a request travels under.

A router that keeps a key at one server does so whatever that server's load. So the key that it sees has an
epoch, `EPISODE/EPOCH`; when the key's server runs more than

    max(ceiling * mean, mean + slack)        requests, `mean` being that of all servers that are routed to,

the epoch is incremented: to the router it is a new key, and goes where new keys go. The episode's cached prefix
is lost once, which is cheaper than a queue.
"""

from __future__ import annotations

from collections.abc import Mapping


class Affinity:
    """Where the keys in use are.

    Args:
        ceiling: times the mean.
        slack: requests above the mean.
    """

    def __init__(self, ceiling: float, slack: int) -> None:
        self._ceiling = ceiling
        self._slack = slack
        self._epochs: dict[str, int] = {}
        self._homes: dict[str, str] = {}
        self.rekeyed = 0
        """How often an epoch was incremented because of load."""

    def place(self, key: str, loads: Mapping[str, int]) -> str:
        """The key to send, `key/epoch`.

        Args:
            key: the caller's.
            loads: requests in flight at each server that is routed to.
        """
        home = self._homes.get(key)
        if home is not None and home in loads and self._drowns(loads[home], loads):
            self.rekeyed += 1
            self._epochs[key] = self._epochs.get(key, 0) + 1
            del self._homes[key]
        return f"{key}/{self._epochs.setdefault(key, 0)}"

    def _drowns(self, load: int, loads: Mapping[str, int]) -> bool:
        mean = sum(loads.values()) / len(loads)
        return load > max(self._ceiling * mean, mean + self._slack)

    def home(self, key: str) -> str | None:
        """The server that answered this key last; None when not known."""
        return self._homes.get(key)

    def settled(self, key: str, sent: str, server: str) -> None:
        """`server` answers what was sent as `sent`; an answer to an older epoch says nothing about the key."""
        if key in self._epochs and sent == f"{key}/{self._epochs[key]}":
            self._homes[key] = server

    def evict(self, server: str) -> None:
        """A server is gone: its keys live nowhere."""
        self._homes = {key: home for key, home in self._homes.items() if home != server}

    def forget(self, key: str) -> None:
        """The episode has ended."""
        self._epochs.pop(key, None)
        self._homes.pop(key, None)
