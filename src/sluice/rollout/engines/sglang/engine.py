"""SGLang over HTTP: the `Engine` protocol and the `Sink` protocol for one running, stock server.

`Flights` carries the requests, `Control` pauses the server and gives it weights; here is what they owe to each
other: the gate is shut while the server is held, and nothing is served after a failure until an `apply` succeeds.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence

import httpx

from sluice.config.sglang import SGLangConfig
from sluice.errors import ConfigError, EngineError
from sluice.rollout.engines.base import Capabilities, GenerateRequest, Generation, PauseMode
from sluice.rollout.engines.sglang.control import Control, vocabulary
from sluice.rollout.engines.sglang.flights import Flights
from sluice.rollout.engines.sglang.wire import Wire
from sluice.types import Version
from sluice.weights.base import Published


class SGLangEngine:
    """A running SGLang server, by URL. The server is neither started nor ended here.

    Nothing is served before the first `apply`: what a server was started with, or what an earlier run left
    there, has no version that this run could vouch for.

    Args:
        url: `http://host:port` of the server itself, not of a router.
        config: transport of the weights, sizes, deadlines.
        name: appears in errors and in `Capabilities`; host and port by default.
        transport: replaces the network, for tests.
    """

    def __init__(
        self, url: str, config: SGLangConfig, *, name: str = "", transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._config = config
        self._name = name or self._url.partition("://")[2]
        self._transport = transport
        self._control: Control | None = None
        self._flights = Flights(
            self,
            name=f"the SGLang server at {self._url}",
            seconds=config.request_seconds,
            slots=config.max_concurrent,
        )
        self._wanted: PauseMode | None = None  # what the caller asked for
        self._lock = asyncio.Lock()  # one pause, resume or update at a time

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> Version | None:
        """None before the first `apply`, and after a failed one until another succeeds."""
        control = self._control
        return None if self._flights.failed or control is None or not control.manifest else control.manifest.version

    async def start(self) -> Capabilities:
        """Handshake: what can the server do? Ends a pause that somebody left behind. Harmless when repeated.

        Raises:
            ConfigError: the environment variable with the server's token is not set.
            EngineError: nobody answers at the URL.
            CapabilityError: the server lacks a route, log-probs, or the transport of the weights.
        """
        if self._control is None:
            key = api_key(self._config)
            self._control = Control(self._url, self._config, name=self._name, api_key=key, transport=self._transport)
        return (await self._control.start()).capabilities

    async def close(self) -> None:
        """Close the connections; requests in flight get Unroutable. The server stays as it is, paused or not."""
        control, self._control = self._control, None
        if control is not None:
            self._flights.fail("the client was closed")
            await control.close()

    @property
    def _ready(self) -> Control:
        if self._control is None:
            raise EngineError(f"the client of {self._url} is not started, or closed", hint="await start() first")
        return self._control

    # ── generation ──────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one continuation; waits while the engine is paused. Cancelling the call ends it there too.

        A request that is aborted while the server holds it in its queue (during a recompute pause) comes back
        without the tokens sampled before. `noise_key` is not used: SGLang's sampling noise cannot be keyed.

        Raises:
            EngineError: the request cannot be served as it is, or the server died or missed the deadline.
            CapabilityError: the distribution that is sampled from could not be reported.
            Unroutable: no version is being served: none was applied yet, or the last update failed.
        """
        control = self._ready
        return await self._flights.generate(request, control.server, vocabulary(control.manifest))

    async def abort(self, rids: Sequence[str] | None = None) -> None:
        """End these requests, or all of this client's, with `Finish.ABORT`. Unknown ids are ignored.

        While paused, requests that the server holds end at the resume: it computes nothing before.
        """
        self._flights.abort(rids)

    async def release(self, routing_key: str) -> None:
        """Nothing is kept by key: there is one server."""

    async def dispatch(self, request: GenerateRequest, failures: int) -> Direct:
        """For `Flights`."""
        return Direct(self._ready, self._flights)

    # ── control ─────────────────────────────────────────────────────────────────────────────────────────

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None:
        """Stop drawing tokens; see `PauseMode`. Pausing twice applies the later mode.

        Raises:
            CapabilityError: the server does not know the mode.
            EngineError: the server died, refused or missed the deadline; it is unroutable then.
        """
        self._ready.refuse_mode(mode)
        async with self._lock:
            self._wanted = mode
            await self._hold(mode)

    async def resume(self) -> None:
        """Go on drawing tokens. After a failed update the server stays paused until an `apply` succeeds."""
        async with self._lock:
            self._wanted = None
            if not self._flights.failed:
                await self._ready.let_go()
                self._flights.open()

    async def flush(self) -> None:
        """Forget all cached prefixes. EngineError while requests are running or kept with their KV cache."""
        await self._ready.flush()

    async def apply(self, published: Published) -> None:
        """Swap in a version: paused for it, in one bracket, and confirmed by the server's own label.

        While serving, the engine pauses with `recompute`, swaps and resumes. See `Control.load`.

        Raises:
            WeightsError: the version is damaged, or the server refused it.
            EngineError: the server died or missed the deadline.
            After either, the server stays paused and serves nothing until an `apply` succeeds; requests in
            flight get Unroutable.
        """
        control = self._ready
        async with self._lock:
            await self._hold(self._wanted or PauseMode.RECOMPUTE)
            try:
                await control.load(published)
            except BaseException:
                self._flights.fail(control.unroutable)
                raise
            if self._wanted is None:
                await control.let_go()
                self._flights.open()
            else:
                self._flights.ready()

    async def _hold(self, mode: PauseMode) -> None:
        control = self._ready
        if control.held is mode:
            return
        self._flights.shut()
        try:
            await control.hold(mode)
        except BaseException:
            self._flights.fail(control.unroutable)
            raise
        if mode is PauseMode.ABORT:
            self._flights.abort()


class Direct:
    """A POST to the one server there is."""

    def __init__(self, control: Control, flights: Flights) -> None:
        self.wire: Wire = control.wire
        self.headers: Mapping[str, str] = {}
        self.label = control.label
        self._control = control
        self._flights = flights
        self._num_pauses = control.num_pauses

    @property
    def held(self) -> bool:
        return self._control.held is not None

    @property
    def lost(self) -> bool:
        return False

    @property
    def server(self) -> str:
        return self._control.name

    def heard(self, headers: Mapping[str, str]) -> None:
        """Nobody else can have answered."""

    def cut(self) -> bool:
        return self._control.num_pauses > self._num_pauses

    def version_of(self, label: str) -> Version:
        """Unroutable when the server names weights that were not applied here."""
        if label not in self._control.versions:
            served = f"it served weights called {label!r}, which were not applied here"
            self._control.unroutable = f"{served}: was it restarted?"
            self._flights.fail(self._control.unroutable)
            self._flights.refuse_if_failed()
        return self._control.versions[label]

    async def abort(self, rid: str) -> None:
        await self.wire.post("/abort_request", {"rid": rid})

    async def failed(self, error: EngineError) -> None:
        raise error

    def close(self) -> None:
        """Nothing is counted."""


def api_key(config: SGLangConfig) -> str:
    """The servers' bearer token. ConfigError when the variable that holds it is not set."""
    name = config.api_key_env
    if name and name not in os.environ:
        raise ConfigError(
            f"rollout.sglang.api_key_env names {name}, which is not set",
            hint=f"export {name}, or clear rollout.sglang.api_key_env",
        )
    return os.environ[name] if name else ""
