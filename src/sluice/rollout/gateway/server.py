"""The gateway: sessions behind one HTTP server in the event loop of whoever starts it.

    agent ── HTTP ──► routes ── Ask ──► Session ── tokens ──► engine
    owner ── HTTP ──► POST /sessions ──► Desk.lease      finish, expiry ──► Desk.finished
    runner ── open, finish ──► the same book of sessions

The server stops by `stop`: it refuses new calls, ends what is in flight, and finishes every open session as aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import uvicorn

from sluice.config.gateway import GatewayConfig
from sluice.errors import ConfigError, EngineError, SluiceError
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import Engine
from sluice.rollout.gateway.app import create_app
from sluice.rollout.gateway.book import Book, Entry
from sluice.rollout.gateway.desk import Desk, Lease, Wanted
from sluice.rollout.gateway.errors import UnknownTask
from sluice.rollout.gateway.keys import OwnerKey
from sluice.rollout.session import Limits, Session
from sluice.types import Episode, Outcome

_LOG = logging.getLogger(__name__)
_START_SECONDS = 30.0
_STOP_SECONDS = 10
_KEEP_ALIVE_SECONDS = 120
"""An agent's tool may run this long between two calls on one connection."""
_SWEEP_SECONDS = 5.0
"""Longest time between two looks at idle sessions."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: Ctrl-C belongs to the program that the gateway is part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """One HTTP server for agents.

    Args:
        config: address, limits, what deviations do.
        engine: serves the policy; started.
        chat: its chat template.
        limits: of every session.
        desk: leases prompts over HTTP; None: sessions are opened by a runner in this process alone.
        policy: name of the policy, and of the model in `/v1/models`.
        routes: bring the experts that each position was routed to into the episodes.

    Attributes:
        book: the sessions.
        owner: the owner's key.
        responses: HTTP answers by route group and status.
        port: it listens on; 0 before it does.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        engine: Engine,
        chat: ChatRenderer,
        limits: Limits,
        desk: Desk | None = None,
        policy: str = "actor",
        routes: bool = False,
    ) -> None:
        self.config = config
        self.chat = chat
        self.policy = policy
        self.desk = desk
        self.book = Book(config.max_sessions, config.retry_after_seconds)
        self.owner = OwnerKey(config.owner_key_env)
        self.responses: Counter[tuple[str, int]] = Counter()
        self.started = time.time()
        self.app = create_app(self)
        self._engine, self._limits, self._routes = engine, limits, routes
        self._server: _Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._url = ""
        self.port = 0

    # The server.

    @property
    def url(self) -> str:
        """`http://host:port` once started. An address for all interfaces is given as the local one."""
        if not self._url:
            raise EngineError("the gateway has not been started", hint="call start() first")
        return self._url

    def name_url(self, url: str) -> None:
        """Say under which address agents reach the gateway, when that is not the one it listens on: behind a proxy,
        or as an application in another server."""
        self._url = url.rstrip("/")

    async def start(self) -> None:
        """Listen. Returns when requests are answered.

        Raises:
            ConfigError: the address cannot be listened on.
            EngineError: the server did not come up.
        """
        listening = self._listen()
        host, port = listening.getsockname()[:2]
        server = _Server(
            uvicorn.Config(
                self.app, log_config=None, log_level="critical", access_log=False, lifespan="off", ws="none",
                server_header=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=_STOP_SECONDS,
            )
        )  # fmt: skip
        serving = asyncio.create_task(server.serve(sockets=[listening]), name="gateway")
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not server.started and not serving.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.005)  # uvicorn has a flag and no event
        except TimeoutError:
            serving.cancel()
            raise EngineError(f"the gateway did not come up within {_START_SECONDS:g} s") from None
        if serving.done():
            raise EngineError(f"the gateway's server ended at once: {serving.exception()}")
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
        self._url = self._url or f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
        self.port = port
        self._server = server
        self._tasks = [serving, asyncio.create_task(self._sweep(), name="gateway idle sessions")]
        for task in self._tasks:
            task.add_done_callback(_tell_fault)

    def _listen(self) -> socket.socket:
        host, port = self.config.host, self.config.port
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, port), family=family, backlog=2048)
            # inherited by connections; asyncio leaves it off for sockets made without a protocol number, and an
            # answer, whose headers and body are two packets, would wait 40 ms for the client's delayed ACK
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return listening
        except OSError as error:
            raise ConfigError(
                f"the gateway cannot listen on {host} port {port}: {error.strerror or error}",
                hint="set rollout.gateway.port to a free one; 0 takes any",
            ) from error

    async def stop(self) -> None:
        """Finish every session as aborted and stop listening. May be called twice."""
        for entry in self.book:
            await self._end(entry, Outcome.ABORTED, "the gateway was stopped")
        if self._server is None:
            return
        serving, sweeping = self._tasks
        sweeping.cancel()
        self._server.should_exit = True
        await asyncio.wait([sweeping, serving], timeout=2 * _STOP_SECONDS)
        serving.cancel()
        self._server = None

    # Sessions.

    def open(self, lease: Lease, *, leased: bool = False) -> tuple[Session, str]:
        """Open a session. Returns it and its key, which is kept nowhere else.

        Raises:
            Busy: as many are open as may be.
        """
        self.book.check_room()
        session = Session(
            id=lease.id,
            group_id=lease.group_id,
            prompt=lease.prompt,
            sampling=lease.sampling,
            engine=self._engine,
            chat=self.chat,
            limits=self._limits,
            noise=lease.noise,
            routes=self._routes,
            policy=self.policy,
        )
        _, key = self.book.add(session, leased=leased)
        return session, key

    async def lease(self, wanted: Wanted) -> tuple[Session, str]:
        """Open a session for what the desk hands out.

        Raises:
            UnknownTask: there is no desk, or it has no such prompt.
            Busy: nothing to lease now, or too many sessions.
        """
        if self.desk is None:
            raise UnknownTask("this gateway leases no prompts", hint="its sessions are opened by the run's own runner")
        self.book.check_room()
        return self.open(await self.desk.lease(wanted), leased=True)

    async def finish(
        self, id: str, outcome: Outcome | None = None, reason: str = "", info: Mapping[str, Any] | None = None
    ) -> Episode:
        """End a session and return its episode; of one that has expired, the episode it left.

        Raises:
            UnknownSession: there is none of that id, or it was finished before.
        """
        if (expired := self.book.claim(id)) is not None:
            return expired
        return await self._end(self.book.by_id(id), outcome, reason, info)

    async def _end(
        self,
        entry: Entry,
        outcome: Outcome | None,
        reason: str,
        info: Mapping[str, Any] | None = None,
        *,
        keep: bool = False,
    ) -> Episode:
        facts = dict(info or {})
        if entry.rewards:
            facts["rewards"] = dict(entry.rewards)
        session = entry.session
        flying = session.in_flight
        episode = session.finish(outcome, reason, facts)
        self.book.close(entry, episode, keep=keep)
        if flying:
            await session.abort()
        await self._engine.release(session.id)
        if self.desk is not None:
            await self.desk.finished(episode, dict(entry.rewards))
        return episode

    async def _sweep(self) -> None:
        """End sessions that nobody has called for `idle_seconds`."""
        limit = self.config.idle_seconds
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, limit / 4))
            now = time.monotonic()
            for entry in self.book:
                if not entry.session.in_flight and now - entry.session.last_used > limit:
                    try:
                        await self._end(entry, Outcome.INFRA_FAILURE, "idle", keep=not entry.leased)
                    except SluiceError:  # the desk could not take it; the others expire all the same
                        _LOG.exception("session %s expired, and its episode could not be handed over", entry.session.id)

    def alarm(self, entry: Entry) -> None:
        """Say once per session that a history came back otherwise than it was recorded."""
        if not entry.alarmed and entry.session.counters()["mismatches"]:
            entry.alarmed = True
            _LOG.warning(
                "session %s: a history came back that is not the recorded one; it was forked or refused",
                entry.session.id,
            )


def _tell_fault(task: asyncio.Task[None]) -> None:
    """A task of the gateway does not die quietly."""
    if not task.cancelled() and (fault := task.exception()) is not None:
        _LOG.error(
            "%s: ended by a fault; agents are served no longer as they should be", task.get_name(), exc_info=fault
        )
