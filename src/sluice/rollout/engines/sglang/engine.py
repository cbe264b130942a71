"""SGLang over HTTP: the `Engine` protocol and the `Sink` protocol for one running, stock server.

    generate ──► gate ──► POST /generate ──► reply, or an abort that a pause of ours caused: again from the tokens
                  ▲            waits for: the reply; unblocked early by: abort, a failed update, close
                  └── closed by pause and apply, opened by resume and by the end of apply, good or bad

Two kinds of servers look alike from outside (`handshake.Server` tells them apart):

* 0.5.21 and later: updates in a begin/end bracket; a recompute pause keeps running sequences as tokens.
* older ones: no bracket is sent, and `recompute` is done here: running requests are aborted at the pause and
  sent again after it, context and sampled tokens together. Every piece then belongs to one version, so the
  spans are right even where the server reports none (up to 0.5.18).

Pitfalls of the server that are handled here, each seen with 0.5.21: it aborts every request whose id *begins*
with the given one; a token id outside the vocabulary, a tensor of the wrong shape, or a flush while sequences
keep their cache, ends the process; an update without a flush leaves cached prefixes of old weights for new
requests to find; a pause is answered before it has happened.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from torch import Tensor

from sluice.config.rollout import SGLangConfig
from sluice.errors import CapabilityError, ConfigError, EngineError, Unroutable, WeightsError
from sluice.rollout.engines.base import Capabilities, Finish, GenerateRequest, Generation, PauseMode
from sluice.rollout.engines.sglang.handshake import Server, shake_hands
from sluice.rollout.engines.sglang.messages import Piece, join, read, sampling_params
from sluice.rollout.engines.sglang.tensors import bucketed, is_local, promised, serialise
from sluice.rollout.engines.sglang.wire import NO_DEADLINE, RefusedError, Wire
from sluice.types import Version
from sluice.weights.base import Manifest, Published

REABORT_SECONDS = 1.0
"""An abort that overtakes its request is ignored by the server; it is sent again after this long."""


@dataclass(slots=True, eq=False)
class Flight:
    """A request that `generate` is busy with.

    Attributes:
        aborted: it is to end as it is.
        signal: set when whoever waits for the reply must look up.
    """

    aborted: bool = False
    signal: asyncio.Event = field(default_factory=asyncio.Event)


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
        self._wire: Wire | None = None
        self._server: Server | None = None
        self._manifest: Manifest | None = None  # of the version that is served
        self._label = ""  # what the server calls it
        self._versions: dict[str, Version] = {}  # by label, all that were applied here
        self._unroutable = "no weights have been applied yet"  # why nothing is served; empty when it is
        self._wanted: PauseMode | None = None  # what the caller asked for
        self._held: PauseMode | None = None  # what the server is in
        self._num_pauses = 0
        self._flights: dict[str, Flight] = {}
        self._gate = asyncio.Event()
        self._gate.set()
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._control = asyncio.Lock()  # one pause, resume or update at a time

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> Version | None:
        """None before the first `apply`, and after a failed one until another succeeds."""
        return None if self._unroutable or self._manifest is None else self._manifest.version

    async def start(self) -> Capabilities:
        """Handshake: what can the server do? Ends a pause that somebody left behind. Harmless when repeated.

        Raises:
            ConfigError: the environment variable with the server's token is not set.
            EngineError: nobody answers at the URL.
            CapabilityError: the server lacks a route, log-probs, or the transport of the weights.
        """
        if self._server is None:
            if self._wire is None:
                seconds = self._config.control_seconds
                self._wire = Wire(self._url, api_key=self._api_key(), seconds=seconds, transport=self._transport)
            if self._config.sync == "tensor" and not is_local(httpx.URL(self._url).host):
                # a server that cannot attach to the shared memory does not say so: it dies
                raise CapabilityError(
                    f"{self._wire.where} is not on this machine, so tensors in shared memory do not reach it",
                    hint="set rollout.sglang.sync=disk, with the run folder on a file system that both see",
                )
            self._server = await shake_hands(self._wire, self._name)
        return self._server.capabilities

    async def close(self) -> None:
        """Close the connections; requests in flight get Unroutable. The server stays as it is, paused or not."""
        wire, self._wire = self._wire, None
        self._server = None
        if wire is not None:
            self._break("the client was closed")
            await wire.close()

    def _api_key(self) -> str:
        name = self._config.api_key_env
        if name and name not in os.environ:
            raise ConfigError(
                f"rollout.sglang.api_key_env names {name}, which is not set",
                hint=f"export {name}, or clear rollout.sglang.api_key_env",
            )
        return os.environ[name] if name else ""

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
        wire, server = self._ready
        self._refuse_if_unroutable()
        max_new_tokens = self._admit(request, server)
        if request.rid in self._flights:
            raise EngineError(f"a request named {request.rid!r} is already running at {wire.where}")
        flight = self._flights[request.rid] = Flight()
        try:
            async with asyncio.timeout(self._config.request_seconds), self._slots:
                pieces = await self._fly(flight, request, max_new_tokens)
        except TimeoutError as error:
            raise EngineError(
                f"{wire.where} did not finish request {request.rid!r} within {self._config.request_seconds:g} s",
                hint="raise rollout.sglang.request_seconds, or lower max_new_tokens or the number of requests",
            ) from error
        finally:
            del self._flights[request.rid]
        return join(pieces, plain=request.sampling.is_plain, version_of=self._version_of)

    def _admit(self, request: GenerateRequest, server: Server) -> int:
        """Refuse what can never be served, or would end the server. Returns how many tokens may be drawn."""
        rid, ids, sampling = request.rid, request.ids, request.sampling
        context_length = server.capabilities.context_length
        vocab_size = self._vocab_size
        if ids.ndim != 1 or not len(ids):
            raise EngineError(f"request {rid!r} has a context of shape {list(ids.shape)}, not [n ≥ 1]")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            raise EngineError(
                f"request {rid!r} has token ids from {low} to {high}; the vocabulary has {vocab_size}",
                hint="prompts must be made with the tokenizer of the model that is served",
            )
        if len(ids) >= context_length:
            raise EngineError(
                f"request {rid!r} has {len(ids)} context tokens; {self._name} holds {context_length}, and at "
                "least one token must be drawn",
                hint="shorten the prompt or start SGLang with a larger --context-length",
            )
        if not sampling.is_plain and not server.reports_kept(sampling):
            raise CapabilityError(
                f"{self._name} cannot report the distribution it samples from with {sampling}",
                hint=f"with top_p or min_p also set top_k, from 1 to {server.mask_tokens}, or sample plainly",
            )
        return min(sampling.max_new_tokens, context_length - len(ids))

    async def _fly(self, flight: Flight, request: GenerateRequest, max_new_tokens: int) -> list[Piece]:
        """Send, and send again after each abort that a pause of ours caused, until the request has ended."""
        wire, server = self._ready
        pieces: list[Piece] = []
        while True:
            await self._pass_gate(flight)
            drawn = [token for piece in pieces for token in piece.ids]
            if flight.aborted or len(drawn) == max_new_tokens:
                return [*pieces, Piece(Finish.ABORT if flight.aborted else Finish.LENGTH)]
            num_pauses, label = self._num_pauses, self._label
            body: dict[str, Any] = {
                # fixed length, because the server aborts every id that begins with the given one
                "rid": secrets.token_hex(16),
                "input_ids": [*request.ids.tolist(), *drawn],
                "sampling_params": sampling_params(request.sampling, max_new_tokens - len(drawn)),
                "return_logprob": True,
                "return_sampling_mask": not request.sampling.is_plain,
                "stream": False,
            }
            if server.salted:
                body["extra_key"] = label  # no prefix is shared between versions, flushed or not
            piece = read(await self._reply(flight, wire, body), request, label)
            cut = piece.finish is Finish.ABORT and not flight.aborted and self._num_pauses > num_pauses
            if server.retracts or not cut:
                return [*pieces, piece]
            # a stop string may lie across the cut, where the server cannot see it: start over then
            pieces = [] if request.sampling.stop else [*pieces, piece]

    async def _pass_gate(self, flight: Flight) -> None:
        """Wait until the engine runs, or the request is aborted. Unroutable after a failed update."""
        while not self._gate.is_set() and not flight.aborted:
            waits = [asyncio.ensure_future(self._gate.wait()), asyncio.ensure_future(flight.signal.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        self._refuse_if_unroutable()

    async def _reply(self, flight: Flight, wire: Wire, body: dict[str, Any]) -> dict[str, Any]:
        """One POST /generate. A failed update ends the wait; an abort is repeated until it has an effect."""
        post = asyncio.ensure_future(wire.post("/generate", body, seconds=NO_DEADLINE))
        signal = asyncio.ensure_future(flight.signal.wait())
        try:
            while not post.done():
                waits, seconds = ({post}, REABORT_SECONDS) if signal.done() else ({post, signal}, None)
                await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                self._refuse_if_unroutable()
                if flight.aborted and self._held is None and not post.done():
                    await wire.post("/abort_request", {"rid": body["rid"]})
            return post.result()
        finally:
            for task in (post, signal):
                task.cancel()  # closes the connection, which ends the request at the server
            await asyncio.gather(post, signal, return_exceptions=True)

    def _version_of(self, label: str) -> Version:
        """Unroutable when the server names weights that were not applied here."""
        if label not in self._versions:
            self._break(f"it served weights called {label!r}, which were not applied here: was it restarted?")
            self._refuse_if_unroutable()
        return self._versions[label]

    # ── control ─────────────────────────────────────────────────────────────────────────────────────────

    async def abort(self, rids: Sequence[str] | None = None) -> None:
        """End these requests, or all of this client's, with `Finish.ABORT`. Unknown ids are ignored.

        While paused, requests that the server holds end at the resume: it computes nothing before.
        """
        for rid in list(self._flights) if rids is None else rids:
            if rid in self._flights:
                self._flights[rid].aborted = True
                self._flights[rid].signal.set()

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None:
        """Stop drawing tokens; see `PauseMode`. Pausing twice applies the later mode.

        Raises:
            CapabilityError: the server does not know the mode.
            EngineError: the server died, refused or missed the deadline; it is unroutable then.
        """
        wire, server = self._ready
        if mode not in server.capabilities.pause_modes:
            known = ", ".join(sorted(server.capabilities.pause_modes))
            raise CapabilityError(f"{wire.where} cannot pause with {mode}", hint=f"it can with {known}")
        async with self._control:
            self._wanted = mode
            await self._hold(mode)

    async def resume(self) -> None:
        """Go on drawing tokens. After a failed update the server stays paused until an `apply` succeeds."""
        async with self._control:
            self._wanted = None
            if not self._unroutable:
                await self._let_go()

    async def flush(self) -> None:
        """Forget all cached prefixes. EngineError while requests are running or kept with their KV cache."""
        wire, _ = self._ready
        await wire.post("/flush_cache")

    async def _hold(self, mode: PauseMode) -> None:
        """Bring the server into `mode`; it serves nothing when that fails half-way."""
        wire, server = self._ready
        if self._held is mode:
            return
        if not self._unroutable:
            self._gate.clear()
        self._num_pauses += 1
        word = "in_place" if mode is PauseMode.KEEP_KV else "abort"
        if mode is PauseMode.RECOMPUTE and server.retracts:
            word = "retract"
        try:
            if self._held is PauseMode.KEEP_KV and word == "abort":
                # an abort ends a running request in its next step, and a frozen one has none
                await wire.post("/continue_generation")
            self._held = mode
            await wire.post("/pause_generation", {"mode": word})
            # the reply to a pause comes before the scheduler has seen it; the reply to this comes after
            await wire.get("/server_info")
        except BaseException as error:
            self._break(f"a pause failed: {error or type(error).__name__}")
            raise
        if mode is PauseMode.ABORT:
            await self.abort()

    async def _let_go(self) -> None:
        wire, _ = self._ready
        await wire.post("/continue_generation")
        self._held = None
        self._gate.set()

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────

    async def apply(self, published: Published) -> None:
        """Swap in a version: paused for it, in one bracket, and confirmed by the server's own label.

        While serving, the engine pauses with `recompute`, swaps and resumes. Cached prefixes are forgotten;
        sequences paused with `keep_kv` keep theirs, and new ones do not see it.

        What is not covered: the server ignores a tensor whose name its model lacks, and says so in its log
        only. Names are checked between versions, not against the model.

        Raises:
            WeightsError: the version is damaged, or the server refused it.
            EngineError: the server died or missed the deadline.
            After either, the server stays paused and serves nothing until an `apply` succeeds; requests in
            flight get Unroutable.
        """
        wire, _ = self._ready
        manifest = published.manifest
        # the checksum tells this version from one of the same name that another run left at the server
        label = f"{manifest.version}+{manifest.checksum[:16]}"
        async with self._control:
            await self._hold(self._wanted or PauseMode.RECOMPUTE)
            try:
                self._refuse_if_reshaped(manifest)
                if self._unroutable:
                    await self._close_bracket()
                self._unroutable = self._unroutable or f"version {manifest.version} is being applied"
                if self._config.sync == "disk":
                    await self._apply_folder(published, label)
                else:
                    await self._apply_tensors(published, label)
                served = (await wire.get("/model_info")).get("weight_version")
                if served != label:
                    raise RefusedError(f"{wire.where} calls its weights {served!r} after {label!r} was applied")
            except BaseException as error:
                self._break(f"version {manifest.version} could not be applied: {error or type(error).__name__}")
                if isinstance(error, RefusedError):
                    raise WeightsError(
                        f"{self._name} did not take version {manifest.version}: {error}", hint=error.hint
                    ) from error
                raise
            self._manifest, self._label = manifest, label
            self._versions[label] = manifest.version
            self._unroutable = ""
            if self._wanted is None:
                await self._let_go()
            else:
                self._gate.clear()  # an earlier failure may have opened it

    async def _apply_folder(self, published: Published, label: str) -> None:
        wire, _ = self._ready
        folder = await asyncio.to_thread(published.folder)
        body = {"model_path": str(folder.absolute()), "weight_version": label, "flush_cache": self._may_flush}
        try:
            await wire.post("/update_weights_from_disk", body)
        except RefusedError as error:
            hint = "rollout.sglang.sync=disk needs a folder that the server can read under the same path"
            raise RefusedError(str(error), hint=hint) from error

    async def _apply_tensors(self, published: Published, label: str) -> None:
        """In buckets; only the last one flushes the prefix cache and names the version."""
        wire, server = self._ready
        if server.bracketed:
            await wire.post("/begin_weight_update")
        last: list[tuple[str, Tensor]] = []
        for bucket in bucketed(promised(published), self._config.bucket_bytes):
            if last:
                await self._send(last, {"flush_cache": False})
            last = bucket
        await self._send(last, {"flush_cache": self._may_flush, "weight_version": label})
        if server.bracketed:
            await wire.post("/end_weight_update")

    async def _send(self, bucket: list[tuple[str, Tensor]], extra: Mapping[str, Any]) -> None:
        """One bucket through shared memory, which is freed on this side when the server has answered."""
        wire, server = self._ready
        copies = [(name, tensor.detach().clone()) for name, tensor in bucket]  # sharing moves a tensor's memory
        texts = await asyncio.to_thread(serialise, copies, server.tp_size)
        await wire.post("/update_weights_from_tensor", {"serialized_named_tensors": texts, **extra})

    async def _close_bracket(self) -> None:
        """An update that was cut short, by this client or by one before it, may have left its bracket open."""
        wire, server = self._ready
        if server.bracketed:
            try:
                await wire.post("/end_weight_update")
            except RefusedError:
                return  # there was none

    def _refuse_if_reshaped(self, manifest: Manifest) -> None:
        """Versions of one policy have the same tensors; a wrong one would end the server."""
        if self._manifest is None:
            return
        ours, theirs = (
            {(name, info.dtype, tuple(info.shape)) for name, info in which.tensors.items()}
            for which in (self._manifest, manifest)
        )
        if ours != theirs:
            odd = sorted(f"{name} {dtype}{list(shape)}" for name, dtype, shape in ours ^ theirs)
            raise WeightsError(
                f"version {manifest.version} does not have the tensors of version {self._manifest.version}: "
                f"{', '.join(odd[:4])}",
                hint="one engine serves one policy; restart it for another model",
            )

    @property
    def _may_flush(self) -> bool:
        return self._held is not PauseMode.KEEP_KV

    @property
    def _vocab_size(self) -> int | None:
        """Rows of the input embedding; None when no weights of the usual name are known."""
        tensors = self._manifest.tensors.items() if self._manifest else ()
        return next((info.shape[0] for name, info in tensors if name.endswith("embed_tokens.weight")), None)

    # ── refusals ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _ready(self) -> tuple[Wire, Server]:
        if self._wire is None or self._server is None:
            raise EngineError(f"the client of {self._url} is not started, or closed", hint="await start() first")
        return self._wire, self._server

    def _break(self, reason: str) -> None:
        """Serve nothing from now on; whoever waits is told."""
        self._unroutable = reason
        self._gate.set()
        for flight in self._flights.values():
            flight.signal.set()

    def _refuse_if_unroutable(self) -> None:
        if self._unroutable and self._gate.is_set():  # behind a closed gate, an update is under way
            raise Unroutable(
                f"the SGLang server at {self._url} serves nothing: {self._unroutable}",
                hint="apply a whole version to it",
            )
