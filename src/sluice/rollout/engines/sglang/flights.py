"""Generation over a wire: a gate, sending again after what cut a turn short, aborts.

    generate ──► gate ──► dispatch ──► POST /generate ──► reply, or a cut: again from the tokens
                  ▲          │           waits for: the reply; unblocked early by: abort, loss of the server,
                  │          │           `fail`, the request's deadline
                  │          └── where it goes, and what a failure there means, the owner of the servers says
                  └── `shut` by pauses and updates, `open` when they are over, for good or (`fail`) for bad

A request that streams goes on from the tokens it has told, whatever cut it. One that does not is sent again as
it was after a server's death, and goes on from its tokens after a pause that returned them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sluice.errors import EngineError, Unroutable
from sluice.rollout.engines.base import Finish, GenerateRequest, Generation
from sluice.rollout.engines.sglang.dispatch import Dispatch, Ground, Slots, Traffic
from sluice.rollout.engines.sglang.handshake import Server, admit
from sluice.rollout.engines.sglang.messages import Answer, Piece, join, sampling_params
from sluice.rollout.engines.sglang.wire import LostError

REABORT_SECONDS = 1.0
"""An abort that overtakes its request is ignored by the server; it is sent again after this long."""


@dataclass(slots=True, eq=False)
class Flight:
    """A request that `generate` is busy with.

    Attributes:
        request: as it came.
        aborted: it is to end as it is.
        failures: POSTs in a row that brought nothing.
        signal: set when whoever waits for the reply must look up.
        pieces: what was drawn so far.
    """

    request: GenerateRequest
    aborted: bool = False
    failures: int = 0
    signal: asyncio.Event = field(default_factory=asyncio.Event)
    pieces: list[Piece] = field(default_factory=list[Piece])

    @property
    def drawn(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.ids]

    @property
    def routes_start(self) -> int | None:
        """First position whose experts are still wanted."""
        known = [piece.routes for piece in self.pieces if piece.routes is not None]
        return known[-1].end if known else self.request.routes_from

    @property
    def ended(self) -> bool:
        """Whether the last token that was drawn ends the turn, though nobody said so before the cut."""
        drawn = self.drawn
        return bool(drawn) and drawn[-1] in self.request.sampling.stop_token_ids


class Flights:
    """Every request in flight of one engine.

    Args:
        ground: who owns the servers.
        name: of the engine, for errors.
        seconds: deadline of one request.
        slots: requests in flight at once.
    """

    def __init__(self, ground: Ground, *, name: str, seconds: float, slots: int) -> None:
        self._ground = ground
        self._name = name
        self._seconds = seconds
        self.slots = Slots(slots)
        self._flights: dict[str, Flight] = {}
        self._gate = asyncio.Event()
        self._gate.set()
        self._failed = "no weights have been applied yet"
        self._busy, self._since = False, time.perf_counter()
        self.traffic = Traffic()

    # ── the gate ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def failed(self) -> str:
        """Why nothing is served; empty when something is."""
        return self._failed

    @property
    def busy(self) -> bool:
        return bool(self._flights)

    def shut(self) -> None:
        """New requests wait. While nothing is served they are refused instead, as before."""
        if not self._failed:
            self._gate.clear()
        self.count_time()

    def open(self) -> None:
        self._failed = ""
        self._gate.set()
        self.count_time()

    def ready(self) -> None:
        """Something can be served again, but not yet: new requests wait."""
        self._failed = ""
        self._gate.clear()
        self.count_time()

    def count_time(self) -> None:
        """Account the time until now; to be called before and after what changes whether anything is under way."""
        now = time.perf_counter()
        self.traffic.busy_seconds += now - self._since if self._busy else 0.0
        self._busy, self._since = bool(self._flights) and self._gate.is_set() and not self._failed, now

    def fail(self, reason: str) -> None:
        """Serve nothing from now on; whoever waits is told."""
        self._failed = reason
        self._gate.set()
        self.wake()

    def wake(self) -> None:
        """Whoever waits for a reply looks whether its server is still there."""
        for flight in self._flights.values():
            flight.signal.set()

    def refuse_if_failed(self) -> None:
        if self._failed and self._gate.is_set():  # behind a closed gate, an update is under way
            raise Unroutable(f"{self._name} serves nothing: {self._failed}", hint="apply a whole version to it")

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────

    def abort(self, rids: Sequence[str] | None = None) -> None:
        """End these requests, or all. Unknown ids are ignored."""
        for rid in list(self._flights) if rids is None else rids:
            if rid in self._flights:
                self._flights[rid].aborted = True
                self._flights[rid].signal.set()

    async def generate(self, request: GenerateRequest, server: Server, vocab_size: int | None) -> Generation:
        """See `Engine.generate`. `server` is what every server can do, `vocab_size` the rows of the embedding."""
        self.refuse_if_failed()
        max_new_tokens = admit(request, server, vocab_size)
        if request.rid in self._flights:
            raise EngineError(f"a request named {request.rid!r} is already running at {self._name}")
        flight = self._flights[request.rid] = Flight(request)
        self.count_time()
        try:
            async with asyncio.timeout(self._seconds), self.slots:
                engine = await self._fly(flight, server, max_new_tokens)
        except TimeoutError as error:
            raise EngineError(
                f"{self._name} did not finish request {request.rid!r} within {self._seconds:g} s",
                hint="raise rollout.sglang.request_seconds, or lower max_new_tokens or the number of requests",
            ) from error
        finally:
            del self._flights[request.rid]
            self.count_time()
        return join(flight.pieces, plain=request.sampling.is_plain, engine=engine)

    async def _fly(self, flight: Flight, server: Server, max_new_tokens: int) -> str:
        """Send, and send again after each cut, until the request has ended. Returns who served the last piece."""
        who, sent = "", 0
        while True:
            await self._pass_gate(flight)
            drawn = len(flight.drawn)
            if flight.aborted or drawn == max_new_tokens or flight.ended:
                whole = Finish.STOP if flight.ended else Finish.LENGTH if drawn == max_new_tokens else Finish.ABORT
                flight.pieces.append(Piece(whole))
                return who
            dispatch = await self._ground.dispatch(flight.request, flight.failures)
            sent += 1
            self.traffic.resumed += sent == 2  # a turn counts once, however often it is sent
            try:
                ended = await self._post(flight, dispatch, server, max_new_tokens - drawn)
            finally:
                who = dispatch.server or who
                dispatch.close()
            if ended:
                self._count(flight)
                return who

    def _count(self, flight: Flight) -> None:
        self.traffic.context_tokens += len(flight.request.ids)
        self.traffic.cached_tokens += flight.pieces[0].cached_tokens

    async def _post(self, flight: Flight, dispatch: Dispatch, server: Server, max_new_tokens: int) -> bool:
        """One POST. Adds what it brought to the flight; returns whether that was the end of the request."""
        request, tells = flight.request, flight.request.on_tokens is not None
        start = flight.routes_start
        answer = Answer(dispatch.label)
        try:
            await self._listen(flight, dispatch, self._body(flight, dispatch, server, max_new_tokens), answer)
            piece = self._piece(flight, dispatch, answer, start, server)
            cut = piece.finish is Finish.ABORT and not flight.aborted and dispatch.cut()
        except EngineError as error:
            if tells and answer.ids:
                flight.pieces.append(self._piece(flight, dispatch, answer, start, server))
            flight.failures = 0 if answer.ids else flight.failures + 1
            self.refuse_if_failed()
            await dispatch.failed(error)
            return False
        if cut and request.sampling.stop and not tells:
            flight.pieces.clear()  # a stop string may lie across the cut, where no server can see it: start over
        else:
            flight.pieces.append(piece)
        return not cut

    def _body(self, flight: Flight, dispatch: Dispatch, server: Server, max_new_tokens: int) -> dict[str, Any]:
        request = flight.request
        body: dict[str, Any] = {
            # fixed length, because the server aborts every id that begins with the given one
            "rid": secrets.token_hex(16),
            "input_ids": [*request.ids.tolist(), *flight.drawn],
            "sampling_params": sampling_params(request.sampling, max_new_tokens),
            "return_logprob": True,
            "return_sampling_mask": not request.sampling.is_plain,
            "stream": request.on_tokens is not None,
        }
        if server.salted:
            body["extra_key"] = dispatch.label  # no prefix is shared between versions, flushed or not
        if server.keyed:
            body["noise_key"] = request.noise_key
        if flight.routes_start is not None:
            body |= {"return_routed_experts": True, "routed_experts_start_len": flight.routes_start}
        return body

    def _piece(self, flight: Flight, dispatch: Dispatch, answer: Answer, start: int | None, server: Server) -> Piece:
        piece = answer.piece(flight.request, start, server.routes)
        piece.versions.extend(dispatch.version_of(label) for label, _, _ in piece.labels)
        return piece

    async def _pass_gate(self, flight: Flight) -> None:
        """Wait until the engine runs, or the request is aborted. Unroutable when nothing is served."""
        while not self._gate.is_set() and not flight.aborted:
            flight.signal.clear()
            waits = [asyncio.ensure_future(self._gate.wait()), asyncio.ensure_future(flight.signal.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        self.refuse_if_failed()

    async def _listen(self, flight: Flight, dispatch: Dispatch, body: dict[str, Any], answer: Answer) -> None:
        """POST and take in the reply. `fail` and the server's loss end it; an abort is repeated until it works."""
        post = asyncio.ensure_future(self._hear(flight, dispatch, body, answer))
        signal: asyncio.Future[Any] = post
        try:
            while not post.done():
                signal = asyncio.ensure_future(flight.signal.wait())
                seconds = REABORT_SECONDS if flight.aborted and not flight.signal.is_set() else None
                await asyncio.wait({post, signal}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                signal.cancel()
                flight.signal.clear()
                self.refuse_if_failed()
                if dispatch.lost and not post.done():
                    raise LostError(f"{dispatch.server} was lost while it served request {flight.request.rid!r}")
                if flight.aborted and not dispatch.held and not post.done():
                    await dispatch.abort(body["rid"])
            post.result()
        finally:
            for task in (post, signal):
                task.cancel()  # closes the connection, which ends the request at the server
            await asyncio.gather(post, signal, return_exceptions=True)

    async def _hear(self, flight: Flight, dispatch: Dispatch, body: dict[str, Any], answer: Answer) -> None:
        tell = flight.request.on_tokens

        def heard(headers: Mapping[str, str]) -> None:
            dispatch.heard(headers)
            self.traffic.requests[dispatch.server] = self.traffic.requests.get(dispatch.server, 0) + 1

        async for chunk in dispatch.wire.answers("/generate", body, headers=dispatch.headers, heard=heard):
            for label in answer.labels_of(chunk):
                dispatch.version_of(label)  # nothing is told, or kept, that weights of others have drawn
            new = answer.add(chunk)
            if new and tell is not None:
                tell(new)
        if not answer.ended:
            raise LostError(f"{dispatch.wire.where} ended its answer to request {flight.request.rid!r} half-way")
