"""Agents elsewhere: they lease an episode over HTTP when they are ready for one, and finish it there.

run ──► offer ──► POST /sessions ──► leased ──► POST /sessions/ID/finish ──► episode ──► log ──► the finish is answered
          ▲  cancelled                 └── lease_seconds ──► infra_failure
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from sluice.config.runners import ExternalRunner
from sluice.nearest import did_you_mean
from sluice.rollout.gateway.desk import Lease, Wanted
from sluice.rollout.gateway.errors import Busy, SessionClosed, UnknownSession, UnknownTask
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.runners.base import EpisodeRequest
from sluice.rollout.runners.toolkit import Toolkit
from sluice.types import Episode, Outcome, Prompt

LOG_SECONDS = 30.0
"""How long the answer to a finish waits for the log."""
FINISH_SECONDS = 60.0
"""How long a finish that came with the end of the lease may take to end the session's calls."""


@dataclass(slots=True, eq=False)
class _Offer:
    """An episode that waits for an agent, or is with one.

    Attributes:
        withdrawn: it is finished here, and nobody elsewhere waits for the log.
    """

    request: EpisodeRequest
    withdrawn: bool = False
    leased: asyncio.Event = field(default_factory=asyncio.Event)
    episode: asyncio.Future[Episode] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class ExternalDesk:
    """A runner that waits for others to do the work, and the gateway's desk that hands it out.

    Episodes are leased in the order in which they were asked for. The outcome is what the agent's owner finishes the
    session with; one that is not finished within its lease, or that is idle for too long, is an `infra_failure`.

    Args:
        retry_after: seconds that an agent is told to wait when nothing is on offer.
    """

    def __init__(self, config: ExternalRunner, *, retry_after: int) -> None:
        self._config = config
        self._retry_after = retry_after
        self._offers: dict[str, _Offer] = {}
        self._tasks: set[str] = set()
        self._bound: tuple[Toolkit, Gateway] | None = None

    def bind(self, kit: Toolkit, gateway: Gateway) -> None:
        """Desk and gateway need each other: the gateway is made second and told here."""
        self._bound = kit, gateway

    # The runner.

    def admit(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raise DataError when the prompt alone fills the context; remembers its task as one that may be leased."""
        kit, _ = self._parts()
        kit.admit(prompt, max_new_tokens)
        self._tasks.add(prompt.task)

    async def run(self, request: EpisodeRequest) -> Episode:
        """Offer the episode, wait for an agent to lease it, and for its owner to finish it."""
        _, gateway = self._parts()
        offer = self._offers[request.id] = _Offer(request)
        try:
            await offer.leased.wait()  # how long agents may stay away is bounded by limits.stall_seconds
            done, _ = await asyncio.wait({offer.episode}, timeout=self._config.lease_seconds)
            return offer.episode.result() if done else await self._withdraw(offer, gateway)
        except asyncio.CancelledError:
            if offer.leased.is_set() and not offer.episode.done():
                offer.withdrawn = True
                with suppress(UnknownSession):  # its agent is finishing it at this moment
                    await gateway.finish(request.id, Outcome.ABORTED, "the run has ended")
            raise
        finally:
            del self._offers[request.id]

    async def _withdraw(self, offer: _Offer, gateway: Gateway) -> Episode:
        """The episode of a lease that was not kept, or what its agent made of it at the last moment."""
        late = f"not finished within {self._config.lease_seconds:g} s of its lease"
        offer.withdrawn = True
        try:
            return await gateway.finish(offer.request.id, Outcome.INFRA_FAILURE, late)
        except UnknownSession:  # its finish is under way: the session is closed, and a call of it is being ended
            offer.withdrawn = False
            await asyncio.wait({offer.episode}, timeout=FINISH_SECONDS)
            if not offer.episode.done():
                raise
            return offer.episode.result()

    # The desk.

    async def lease(self, wanted: Wanted) -> Lease:
        """The oldest episode on offer that fits.

        Raises:
            UnknownTask: no prompt of the run is like that.
            Busy: none is on offer now.
        """
        if wanted.messages is not None:
            raise UnknownTask("this run trains on prompts of its own", hint="leave `messages` out: you are given some")
        if wanted.task and wanted.task not in self._tasks:
            hint = did_you_mean(wanted.task, self._tasks)
            raise UnknownTask(f"no prompt of this run has the task {wanted.task!r}", hint=hint)
        for offer in self._offers.values():
            request = offer.request
            if offer.leased.is_set() or wanted.task not in ("", request.prompt.task):
                continue
            if wanted.group in ("", request.group_id):
                offer.leased.set()
                return Lease(request.id, request.group_id, request.prompt, request.sampling, request.noise)
        error = Busy("no episode is on offer now", hint="come back later: the run may be training")
        error.retry_after = self._retry_after
        raise error

    async def finished(self, episode: Episode, rewards: Mapping[str, float]) -> None:
        """Hand the episode to whoever waits for it, and return when it is in the log; `rewards` are in its `info`.

        Raises:
            SessionClosed: it was not logged, because the run is ending. A resumed run offers it again.
        """
        offer = self._offers.get(episode.id)
        if offer is None or offer.episode.done():
            return
        offer.episode.set_result(episode)
        if not offer.withdrawn and not await offer.request.receipt.logged(LOG_SECONDS):
            raise SessionClosed(
                f"episode {episode.id} was finished, and the run ended before it was in the log",
                hint="lease another one: a resumed run offers this one again",
            )

    def _parts(self) -> tuple[Toolkit, Gateway]:
        assert self._bound is not None  # `bind` is called where both are made
        return self._bound
