"""SGLang over HTTP: the `Engine` protocol and the `Sink` protocol for one running, stock server.

    generate ──► gate ──► POST /generate ──► reply, or an abort that our own pause caused: again from the tokens
                  ▲            waits for: the reply; unblocked early by: a failed update, close
                  └── closed by pause and apply, opened by resume and by a successful (or failed) apply

What a server can do is read off its `/openapi.json` and one generated token, before any training:

* 0.5.21 and later: updates in a begin/end bracket, pauses that keep running sequences as tokens.
* older ones (no bracket): no bracket is sent, and `recompute` is done here: running requests are aborted at
  the pause and sent again, context and sampled tokens together, after it. Every piece then belongs to one
  version, so the spans are right even where the server reports none (up to 0.5.18).

Pitfalls of the server that are handled here, each seen with 0.5.21: it aborts every request whose id *begins*
with the given one; a token id outside the vocabulary, or a flush while sequences are held, ends the process;
an update that skips the flush leaves cached prefixes of old weights for new requests to find.
"""

from __future__ import annotations

import asyncio
import os
import atexit
import base64
import io
import itertools
import math
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import httpx
import numpy as np
import psutil
import torch
import torch.multiprocessing
from torch import Tensor

from sluice.config.rollout import SGLangConfig
from sluice.errors import CapabilityError, EngineError, Unroutable, WeightsError
from sluice.rollout.engines.base import Capabilities, Finish, GenerateRequest, Generation, PauseMode
from sluice.types import Floats, SamplingParams, Version, VersionSpan
from sluice.weights.base import Published, TensorInfo

REABORT_SECONDS = 1.0
"""An abort that overtakes its request is ignored by the server; it is sent again after this long."""

ROUTES = (
    "/generate", "/abort_request", "/pause_generation", "/continue_generation", "/flush_cache", "/server_info",
    "/model_info", "/update_weights_from_disk", "/update_weights_from_tensor",
)  # fmt: skip
"""What this client cannot do without."""


class _RefusedError(EngineError):
    """The server answered, with an error; caught by name where that has a meaning of its own."""


@dataclass(frozen=True, slots=True)
class _Server:
    """What the handshake found out.

    Attributes:
        bracketed: updates stand between /begin_weight_update and /end_weight_update.
        retracts: a recompute pause is the server's own; else it is an abort, and requests are sent again.
        spans: replies say which version sampled which tokens.
        salted: requests can name a prefix-cache namespace.
        tp_size: tensor-parallel ranks; each reads its own copy of a serialised bucket.
        mask_tokens: largest top_k whose sampled-from distribution is reported; 0 when none is.
    """

    capabilities: Capabilities
    bracketed: bool
    retracts: bool
    spans: bool
    salted: bool
    tp_size: int
    mask_tokens: int


@dataclass(slots=True, eq=False)
class _Flight:
    """A request that `generate` is busy with.

    Attributes:
        wire: its id at the server, of this attempt.
        aborted: it is to end as it is.
        signal: set when whoever waits for the reply must look up.
    """

    wire: str = ""
    aborted: bool = False
    signal: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """One reply: what the server sampled for one POST."""

    ids: list[int]
    logprobs: list[float]
    sampled: list[float] | None
    labels: list[tuple[str, int, int]]
    finish: Finish
    cached_tokens: int


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
        self,
        url: str,
        config: SGLangConfig,
        *,
        name: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._config = config
        self._name = name or self._url.partition("://")[2]
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        self._server: _Server | None = None
        self._version: Version | None = None
        self._versions: dict[str, Version] = {}  # by label, all that were activated here
        self._label = ""
        self._vocab_size: int | None = None
        self._unroutable = "no weights have been applied yet"
        self._wanted: PauseMode | None = None  # what the caller asked for
        self._held: PauseMode | None = None  # what the server is in
        self._num_pauses = 0
        self._flights: dict[str, _Flight] = {}
        self._wires = (f"{secrets.token_hex(6)}-{number:012x}" for number in itertools.count())
        self._gate = asyncio.Event()
        self._gate.set()
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._control = asyncio.Lock()

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> Version | None:
        """None before the first `apply`, and after a failed one until another succeeds."""
        return None if self._unroutable else self._version

    # ── handshake ───────────────────────────────────────────────────────────────────────────────────────

    def _authorization(self) -> dict[str, str]:
        name = self._config.api_key_env
        if not name:
            return {}
        if name not in os.environ:
            raise EngineError(
                f"rollout.sglang.api_key_env names {name}, which is not set",
                hint=f"export {name}=… before starting, or leave api_key_env empty",
            )
        return {"Authorization": f"Bearer {os.environ[name]}"}

    async def start(self) -> Capabilities:
        """Handshake: what can the server do? Ends a pause that somebody left behind. Harmless when repeated.

        Raises:
            EngineError: nobody answers at the URL.
            CapabilityError: the server lacks a route, log-probs, or the transport of the weights.
        """
        if self._server is not None:
            return self._server.capabilities
        if self._client is None:
            headers = self._authorization()
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._config.max_concurrent)
            # deadlines are ours, over whole calls; httpx only knows the time between two bytes
            self._client = httpx.AsyncClient(
                base_url=self._url, headers=headers, timeout=None, limits=limits, transport=self._transport
            )
        spec = await self._spec()
        info = await self._json("GET", "/server_info")
        await self._json("POST", "/continue_generation", {})
        spans = await self._probe()
        pause = _fields(spec, "/pause_generation").get("mode", {}).get("enum", [])
        bracketed = "/begin_weight_update" in spec["paths"]
        retracts = bracketed and spans and "retract" in pause
        salted = "extra_key" in _fields(spec, "/generate")
        modes = {PauseMode.RECOMPUTE, PauseMode.ABORT}
        if spans and salted and "in_place" in pause:
            modes.add(PauseMode.KEEP_KV)
        masks = "return_sampling_mask" in _fields(spec, "/generate")
        capabilities = Capabilities(
            name=self._name,
            engine_version=f"sglang {info.get('version', 'of unknown version')}",
            context_length=int(info.get("context_length") or info["max_req_input_len"]),
            version_spans=spans,
            bracketed_updates=bracketed,
            pause_modes=frozenset(modes),
        )
        self._server = _Server(
            capabilities,
            bracketed,
            retracts,
            spans,
            salted,
            tp_size=int(info.get("tp_size", 1)),
            mask_tokens=int(info.get("sampling_mask_max_tokens") or 4096) if masks else 0,
        )
        self._refuse_if_far()
        return capabilities

    async def _spec(self) -> dict[str, Any]:
        """The server's description of its routes."""
        try:
            spec = await self._json("GET", "/openapi.json")
        except _RefusedError as error:
            raise CapabilityError(
                f"{self._where} does not describe its routes: {error}",
                hint="start SGLang without DISABLE_OPENAPI_DOC, and give the URL of the server, not of a router",
            ) from error
        missing = [route for route in ROUTES if route not in spec.get("paths", {})]
        if missing:
            raise CapabilityError(
                f"{self._where} lacks {', '.join(missing)}",
                hint="it must be an SGLang server, 0.5.17 or newer; 0.5.21 is what Sluice is tested with",
            )
        return spec

    async def _probe(self) -> bool:
        """Generate one token. Returns whether the reply has version spans; CapabilityError without log-probs."""
        body = {
            "input_ids": [0],
            "sampling_params": {"max_new_tokens": 1, "ignore_eos": True},
            "return_logprob": True,
        }
        meta = (await self._json("POST", "/generate", body)).get("meta_info", {})
        if not meta.get("output_token_logprobs"):
            raise CapabilityError(
                f"{self._where} returns no log-probs of sampled tokens",
                hint="behaviour log-probs must come from the engine: use a newer SGLang",
            )
        return "weight_versions" in meta

    def _refuse_if_far(self) -> None:
        """Shared memory reaches this machine only, and a server that cannot attach to it dies of it."""
        host = httpx.URL(self._url).host
        if self._config.sync != "tensor" or _is_local(host):
            return
        raise CapabilityError(
            f"{self._where} is not on this machine, so tensors in shared memory do not reach it",
            hint="set rollout.sglang.sync=disk, with the run folder on a file system that both see",
        )

    # ── generation ──────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one continuation; waits while the engine is paused. Cancelling the call ends it there too.

        A request that is aborted while the server holds it in its queue (during a recompute pause) comes back
        without the tokens sampled before. `noise_key` is not used: SGLang's sampling noise cannot be keyed.

        Raises:
            EngineError: the request cannot be served as it is, or the server died or missed the deadline.
            CapabilityError: the distribution that was sampled from could not be reported.
            Unroutable: no version is being served: none was applied yet, or the last update failed.
        """
        self._refuse_if_unroutable()
        params = self._params(request)
        if request.rid in self._flights:
            raise EngineError(f"a request named {request.rid!r} is already running at {self._where}")
        flight = self._flights[request.rid] = _Flight()
        try:
            async with asyncio.timeout(self._config.request_seconds), self._slots:
                return await self._fly(flight, request, params)
        except TimeoutError as error:
            raise EngineError(
                f"{self._where} did not finish request {request.rid!r} within {self._config.request_seconds:g} s",
                hint="raise rollout.sglang.request_seconds, or lower max_new_tokens or the number of requests",
            ) from error
        finally:
            del self._flights[request.rid]

    async def _fly(self, flight: _Flight, request: GenerateRequest, params: dict[str, Any]) -> Generation:
        """Send, and send again after each abort that a pause of ours caused, until the request has ended."""
        pieces: list[_Piece] = []
        while True:
            await self._pass_gate(flight)
            drawn = [token for piece in pieces for token in piece.ids]
            if flight.aborted:
                return self._generation(request, [*pieces, _Piece([], [], [], [], Finish.ABORT, 0)])
            if len(drawn) == params["max_new_tokens"]:
                return self._generation(request, [*pieces, _Piece([], [], [], [], Finish.LENGTH, 0)])
            flight.wire = next(self._wires)
            num_pauses, label = self._num_pauses, self._label
            reply = await self._reply(flight, self._body(flight.wire, request, drawn, params))
            piece = self._piece(request, reply, label)
            by_pause = piece.finish is Finish.ABORT and self._num_pauses > num_pauses and not flight.aborted
            if not by_pause or self._ready.retracts:
                return self._generation(request, [*pieces, piece])
            # a stop string may lie across the cut, where the server cannot see it: start over then
            pieces = [] if request.sampling.stop else [*pieces, piece]

    async def _pass_gate(self, flight: _Flight) -> None:
        """Wait until the engine is running, or the request is aborted. Unroutable after a failed update."""
        while not self._gate.is_set() and not flight.aborted:
            waits = [asyncio.ensure_future(self._gate.wait()), asyncio.ensure_future(flight.signal.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        self._refuse_if_unroutable()

    async def _reply(self, flight: _Flight, body: dict[str, Any]) -> dict[str, Any]:
        """One POST /generate. A failed update ends the wait; an abort is repeated until it has an effect."""
        post = asyncio.ensure_future(self._json("POST", "/generate", body, seconds=math.inf))
        signal = asyncio.ensure_future(flight.signal.wait())
        try:
            while not post.done():
                waits = {post} if signal.done() else {post, signal}
                seconds = REABORT_SECONDS if signal.done() else None
                await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                self._refuse_if_unroutable()
                if flight.aborted and self._held is None and not post.done():
                    await self._json("POST", "/abort_request", {"rid": flight.wire})
            return await post
        finally:
            for task in (post, signal):
                task.cancel()
            await asyncio.gather(post, signal, return_exceptions=True)

    def _params(self, request: GenerateRequest) -> dict[str, Any]:
        """Every sampling parameter in SGLang's words, so that no default of the server or model steps in."""
        ids, sampling, context = request.ids, request.sampling, self._ready.capabilities.context_length
        if ids.ndim != 1 or not len(ids):
            raise EngineError(f"request {request.rid!r} has a context of shape {list(ids.shape)}, not [n ≥ 1]")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self._vocab_size is not None and high >= self._vocab_size):
            raise EngineError(
                f"request {request.rid!r} has token ids from {low} to {high}; the vocabulary has {self._vocab_size}",
                hint="prompts must be made with the tokenizer of the model that is served",
            )
        if len(ids) >= context:
            raise EngineError(
                f"request {request.rid!r} has {len(ids)} context tokens; {self._name} holds {context}, and at "
                "least one token must be drawn",
                hint="shorten the prompt or start SGLang with a larger --context-length",
            )
        if not sampling.is_plain and not self._reports_kept(sampling):
            raise CapabilityError(
                f"{self._where} cannot report the distribution it samples from with {sampling}",
                hint=f"with top_p or min_p also set top_k, from 1 to {self._ready.mask_tokens}, or sample plainly",
            )
        return {
            "max_new_tokens": min(sampling.max_new_tokens, context - len(ids)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "n": 1,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": False,  # it would switch off stop_token_ids too
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }

    def _reports_kept(self, sampling: SamplingParams) -> bool:
        limit = self._ready.mask_tokens
        return limit > 0 and (sampling.temperature == 0 or 1 <= sampling.top_k <= limit)

    def _body(
        self, wire: str, request: GenerateRequest, drawn: Sequence[int], params: Mapping[str, Any]
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "rid": wire,
            "input_ids": [*request.ids.tolist(), *drawn],
            "sampling_params": {**params, "max_new_tokens": params["max_new_tokens"] - len(drawn)},
            "return_logprob": True,
            "logprob_start_len": -1,
            "stream": False,
        }
        if not request.sampling.is_plain:
            body["return_sampling_mask"] = True
        if self._ready.salted:
            body["extra_key"] = self._label  # no prefix is shared between versions, flushed or not
        return body

    def _piece(self, request: GenerateRequest, reply: Mapping[str, Any], label: str) -> _Piece:
        """Read a reply to a request sent under `label`; EngineError when it contradicts itself."""
        meta = reply["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] == "stop" and reason.get("matched") == "NaN happened":
            raise EngineError(f"{self._where} got NaN logits for request {request.rid!r} at {self._label}")
        finish = Finish(reason["type"])
        # an abort in the queue has neither log-probs nor, then, tokens
        ids = reply.get("output_ids") or [] if "output_token_logprobs" in meta else []
        logprobs = [float(row[0]) for row in meta.get("output_token_logprobs") or []]
        sampled = None
        if not request.sampling.is_plain:
            sampled = [float(value) for value in meta.get("output_token_sampling_logprobs") or []]
        lengths = {len(ids), len(logprobs), len(ids) if sampled is None else len(sampled)}
        if len(lengths) != 1 or not np.isfinite(logprobs).all():
            raise EngineError(
                f"{self._where} returned {len(ids)} tokens for request {request.rid!r}, and "
                f"{len(logprobs)} log-probs of which {int(np.isfinite(logprobs).sum())} are finite"
            )
        # a server without spans keeps no request across a pause: one reply is one version
        whole = {"version": meta.get("weight_version", label), "start": 0, "end": len(ids)}
        rows = meta.get("weight_versions") or [whole]
        labels = [(str(row["version"]), int(row["start"]), int(row["end"])) for row in rows]
        return _Piece(ids, logprobs, sampled, labels, finish, int(meta.get("cached_tokens") or 0))

    def _generation(self, request: GenerateRequest, pieces: Sequence[_Piece]) -> Generation:
        """Join the pieces; raises Unroutable when the server names weights that were not applied here."""
        spans: list[VersionSpan] = []
        at = 0
        for piece in pieces:
            for label, start, end in piece.labels:
                if start < end:
                    version = self._version_of(label)
                    if spans and spans[-1].version == version:
                        spans[-1] = spans[-1]._replace(end=at + end)
                    else:
                        spans.append(VersionSpan(at + start, at + end, version))
            at += len(piece.ids)
        sampled = None
        if not request.sampling.is_plain:
            sampled = _floats(value for piece in pieces for value in piece.sampled or [])
        return Generation(
            ids=np.array([token for piece in pieces for token in piece.ids], dtype=np.int32),
            logprobs=_floats(value for piece in pieces for value in piece.logprobs),
            spans=tuple(spans),
            finish=pieces[-1].finish,
            sampled_logprobs=sampled,
            cached_tokens=pieces[0].cached_tokens,
        )

    def _version_of(self, label: str) -> Version:
        if label not in self._versions:
            self._break(f"it served weights called {label!r}, which were not applied here: was it restarted?")
            self._refuse_if_unroutable()
        return self._versions[label]

    # ── control ─────────────────────────────────────────────────────────────────────────────────────────

    async def abort(self, rids: Sequence[str] | None = None) -> None:
        """End these requests, or all of this client's, with `Finish.ABORT`. Unknown ids are ignored.

        While paused, requests that the server holds end at the resume: it computes nothing before.
        """
        wanted = list(self._flights) if rids is None else [rid for rid in rids if rid in self._flights]
        for rid in wanted:
            self._flights[rid].aborted = True
            self._flights[rid].signal.set()

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None:
        """Stop drawing tokens; see `PauseMode`. Pausing twice applies the later mode.

        Raises:
            CapabilityError: the server does not know the mode.
            EngineError: the server died, refused or missed the deadline.
        """
        if mode not in self._ready.capabilities.pause_modes:
            known = ", ".join(sorted(self._ready.capabilities.pause_modes))
            raise CapabilityError(f"{self._where} cannot pause with {mode}", hint=f"it can with {known}")
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
        await self._json("POST", f"/flush_cache?timeout={self._config.control_seconds / 2:g}")

    async def close(self) -> None:
        """Close the connections; requests in flight get Unroutable. The server stays as it is, paused or not."""
        client, self._client = self._client, None
        self._server = None
        if client is not None:
            self._break("the client was closed")
            await client.aclose()

    async def _hold(self, mode: PauseMode) -> None:
        """Bring the server into `mode`; it serves nothing when that fails half-way."""
        if self._held is mode:
            return
        if not self._unroutable:
            self._gate.clear()
        self._num_pauses += 1
        try:
            if self._held is PauseMode.KEEP_KV and mode is not PauseMode.RECOMPUTE:
                # an abort ends a running request in its next step, and a frozen one has none
                await self._json("POST", "/continue_generation", {})
            self._held = mode
            await self._json("POST", "/pause_generation", {"mode": self._word(mode)})
            # the reply to a pause is sent before the scheduler has seen it; this one comes after
            await self._json("GET", "/server_info")
        except BaseException as error:
            self._break(f"a pause failed: {error or type(error).__name__}")
            raise
        if mode is PauseMode.ABORT:
            await self.abort()

    def _word(self, mode: PauseMode) -> str:
        """SGLang's name of a pause mode."""
        if mode is PauseMode.KEEP_KV:
            return "in_place"
        return "retract" if mode is PauseMode.RECOMPUTE and self._ready.retracts else "abort"

    async def _let_go(self) -> None:
        await self._json("POST", "/continue_generation", {})
        self._held = None
        self._gate.set()

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────

    async def apply(self, published: Published) -> None:
        """Swap in a version: paused for it, in one bracket, and confirmed by the server's own label.

        While serving, the engine pauses with `recompute`, swaps and resumes. Cached prefixes are forgotten;
        sequences paused with `keep_kv` keep theirs, and new ones do not see it.

        Raises:
            WeightsError: the server refused the version.
            EngineError: the server died or missed the deadline.
            After either, the server stays paused and serves nothing until an `apply` succeeds; requests in
            flight get Unroutable.
        """
        manifest = published.manifest
        label = f"{manifest.version}+{manifest.checksum[:16]}"
        async with self._control:
            self._refuse_if_reshaped(manifest)
            await self._hold(self._wanted or PauseMode.RECOMPUTE)
            try:
                if self._unroutable:
                    await self._close_bracket()
                self._unroutable = self._unroutable or f"version {manifest.version} is being applied"
                if self._config.sync == "disk":
                    await self._apply_folder(published, label)
                else:
                    await self._apply_tensors(published, label)
                served = (await self._json("GET", "/model_info")).get("weight_version")
                if served != label:
                    raise _RefusedError(f"{self._where} calls its weights {served!r} after {label!r} was applied")
            except BaseException as error:
                self._break(f"version {manifest.version} could not be applied: {error or type(error).__name__}")
                if isinstance(error, _RefusedError):
                    raise WeightsError(
                        f"{self._name} did not take version {manifest.version}: {error}", hint=error.hint
                    ) from error
                raise
            self._version = self._versions[label] = manifest.version
            self._label = label
            self._shapes = {name: (info.dtype, info.shape) for name, info in manifest.tensors.items()}
            self._unroutable = ""
            if self._wanted is None:
                await self._let_go()
            else:
                self._gate.clear()  # an earlier failure may have opened it

    async def _apply_folder(self, published: Published, label: str) -> None:
        folder = await asyncio.to_thread(published.folder)
        body = {"model_path": str(folder.absolute()), "weight_version": label, "flush_cache": self._may_flush}
        try:
            await self._json("POST", "/update_weights_from_disk", body)
        except _RefusedError as error:
            raise _RefusedError(
                str(error), hint="rollout.sglang.sync=disk needs a folder that the server can read under that path"
            ) from error

    async def _apply_tensors(self, published: Published, label: str) -> None:
        """In buckets; the last one flushes the prefix cache and names the version."""
        if self._ready.bracketed:
            await self._json("POST", "/begin_weight_update", {})
        held: list[tuple[str, Tensor]] = []
        for bucket in bucketed(_as_promised(published), self._config.bucket_bytes):
            if held:
                await self._send(held, {"flush_cache": False})
            held = bucket
        if not held:
            raise _RefusedError(f"version {published.manifest.version} has no tensors")
        await self._send(held, {"flush_cache": self._may_flush, "weight_version": label})
        if self._ready.bracketed:
            await self._json("POST", "/end_weight_update", {})

    async def _send(self, bucket: list[tuple[str, Tensor]], extra: Mapping[str, Any]) -> None:
        """One bucket through shared memory; freed on this side when the server has answered."""
        # copies, because pickling moves a tensor's own memory; and one per rank reads its own pickle
        copies = [(name, tensor.detach().clone()) for name, tensor in bucket]
        serialised = await asyncio.to_thread(serialise, copies, self._ready.tp_size)
        await self._json("POST", "/update_weights_from_tensor", {"serialized_named_tensors": serialised, **extra})

    async def _close_bracket(self) -> None:
        """An update that was cut short, by this client or by one before it, left its bracket open."""
        if self._ready.bracketed:
            try:
                await self._json("POST", "/end_weight_update", {})
            except _RefusedError:
                return  # the usual case: there was none

    @property
    def _may_flush(self) -> bool:
        """A flush while sequences keep their KV cache would end the server."""
        return self._held is not PauseMode.KEEP_KV

    # ── refusals and calls ──────────────────────────────────────────────────────────────────────────────

    @property
    def _where(self) -> str:
        return f"the SGLang server at {self._url}"

    @property
    def _ready(self) -> _Server:
        if self._server is None:
            raise EngineError(f"{self._where} was not started", hint="await start() first")
        return self._server

    def _break(self, reason: str) -> None:
        """Serve nothing from now on; whoever waits is told."""
        self._unroutable = reason
        self._gate.set()
        for flight in self._flights.values():
            flight.signal.set()

    def _refuse_if_unroutable(self) -> None:
        if self._unroutable and self._gate.is_set():  # behind a closed gate an update is under way
            raise Unroutable(f"{self._where} serves nothing: {self._unroutable}", hint="apply a whole version to it")

    async def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, seconds: float | None = None
    ) -> dict[str, Any]:
        """One call. Returns the reply's object, empty when it is none.

        Raises:
            _RefusedError: an error status, or `success: false`.
            EngineError: no connection, no reply within `seconds` (default: control_seconds), or a broken one.
        """
        if self._client is None:
            raise EngineError(f"{self._where} was not started, or the client was closed")
        seconds = self._config.control_seconds if seconds is None else seconds
        try:
            async with asyncio.timeout(None if math.isinf(seconds) else seconds):
                response = await self._client.request(method, path, json=body)
        except TimeoutError as error:
            raise EngineError(
                f"{self._where} did not answer {method} {path} within {seconds:g} s",
                hint="see the server's log; rollout.sglang.control_seconds is the deadline",
            ) from error
        except httpx.HTTPError as error:
            detail = str(error) or type(error).__name__
            raise EngineError(
                f"{self._where} cannot be reached for {method} {path}: {detail}",
                hint="is it running, and at that address? see the end of its log",
            ) from error
        return self._read(response, f"{method} {path}")

    def _read(self, response: httpx.Response, call: str) -> dict[str, Any]:
        try:
            content: Any = response.json() if response.content else {}
        except ValueError:
            content = response.text
        reply = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
        if response.is_success and reply.get("success", True):
            return reply
        why = reply.get("message") or reply.get("error") or content or response.reason_phrase
        why = cast("dict[str, Any]", why).get("message", why) if isinstance(why, dict) else why
        raise _RefusedError(f"{self._where} refused {call} with status {response.status_code}: {str(why)[:500]}")


# ── helpers ─────────────────────────────────────────────────────────────────────────────────────────────────


def bucketed(tensors: Iterable[tuple[str, Tensor]], num_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group named tensors, in order, into lists of at most `num_bytes`; a larger tensor stands alone."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > num_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _as_promised(published: Published) -> Iterator[tuple[str, Tensor]]:
    """The version's tensors; a tensor that is not as the manifest says would end the server, so it ends us."""
    manifest = published.manifest
    missing = dict(manifest.tensors)
    for name, tensor in published.tensors():
        info = missing.pop(name, None)
        here = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if info is None or here != (info.dtype, tuple(info.shape)):
            raise WeightsError(f"{name} of version {manifest.version} is {here}, its manifest says {info}")
        yield name, tensor
    if missing:
        raise WeightsError(f"version {manifest.version} lacks {', '.join(sorted(missing))}")


def serialise(bucket: list[tuple[str, Tensor]], copies: int = 1) -> list[str]:
    """Named CPU tensors as SGLang reads them: base64 of a pickle whose storages are files in shared memory.

    Only torch is needed on this side. The tensors' memory moves to shared memory; it is freed when they are
    gone here and in the reader. Torch's sharing strategy, one per process, is changed for the time of the
    call: with the usual one, passing file descriptors, the reader cannot authenticate and dies.

    Args:
        bucket: (name, tensor) pairs.
        copies: how many processes will read; each must get a pickle of its own.
    """
    usual = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        texts: list[str] = []
        for _ in range(copies):
            buffer = io.BytesIO()
            ForkingPickler(buffer).dump(bucket)
            texts.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
        return texts
    finally:
        torch.multiprocessing.set_sharing_strategy(usual)
        atexit.unregister(end_shm_manager)
        atexit.register(end_shm_manager)


def end_shm_manager() -> None:
    """End torch's `torch_shm_manager`, which the first shared tensor started as a child of this process.

    It would live as long as the server, and hold this process's stdout open: pipes to us would never end.
    Only at exit: torch cannot start a second one.
    """
    for child in psutil.Process().children():
        try:
            if child.name() == "torch_shm_manager":
                child.terminate()
        except psutil.NoSuchProcess:
            continue  # ended by itself


def _fields(spec: Mapping[str, Any], route: str) -> dict[str, Any]:
    """The properties of a route's JSON body in an OpenAPI description; empty when it takes none."""
    post = spec["paths"][route].get("post", {})
    schema = post.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in schema:
        schema = spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema.get("properties", {})


def _is_local(host: str) -> bool:
    """Whether `host` is an address of this machine: only those can be bound."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        for family, kind, _, _, address in found:
            with socket.socket(family, kind) as probe:
                probe.bind((address[0], 0))
    except OSError:
        return False
    return True


def _vocab_size(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Rows of the input embedding; None when there is none of the usual name."""
    rows = (info.shape[0] for name, info in tensors.items() if name.endswith("embed_tokens.weight"))
    return next(rows, None)


def _floats(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float32)
