"""Who hands out work: what a session is opened for, and who is told when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sluice.types import Episode, Message, Prompt, SamplingParams


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `POST /sessions` asks for.

    Attributes:
        task: only a prompt of this task; empty: any.
        group: only a prompt of this group; empty: any.
        messages: a prompt that the caller brings; None: one is leased.
        metadata: the caller's own, for the prompt it brings.
    """

    task: str = ""
    group: str = ""
    messages: tuple[Message, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Lease:
    """One episode to be executed: what `Session` is made from.

    Attributes:
        id, group_id, prompt: of the episode.
        sampling: pinned for the session.
        noise: the key of a turn's sampling noise by the turn's name.
    """

    id: str
    group_id: str
    prompt: Prompt
    sampling: SamplingParams
    noise: Callable[[str], int]


class Desk(Protocol):
    """Leases prompts to agents that come over HTTP."""

    async def lease(self, wanted: Wanted) -> Lease:
        """Raises Busy when there is nothing now, UnknownTask when there never will be."""
        ...

    async def finished(self, episode: Episode, rewards: Mapping[str, float]) -> None:
        """Called once for every session that ends, expired ones included."""
        ...
