"""The control plane of one server: handshake, pause, resume, weights.

Two kinds of servers look alike from outside (`handshake.Server` tells them apart):

* 0.5.21 and later: updates in a begin/end bracket; a recompute pause keeps running sequences as tokens.
* older ones, and those of a prefill/decode set: `recompute` is an abort of what runs, which `Flights` sends
  again after it, context and sampled tokens together. Every piece then belongs to one version, so the spans are
  right even where the server reports none (up to 0.5.18).

Pitfalls of the server that are handled here, each seen with 0.5.21: a tensor of the wrong shape, or a flush
while sequences keep their cache, ends the process; an update without a flush leaves cached prefixes of old
weights for new requests to find; a pause is answered before it has happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

from sluice import device as devices
from sluice.config.sglang import SGLangConfig
from sluice.errors import CapabilityError, EngineError, WeightsError
from sluice.rollout.engines.base import Memory, PauseMode
from sluice.rollout.engines.sglang.handshake import Server, shake_hands
from sluice.rollout.engines.sglang.tensors import bucketed, free_unread, is_local, promised, serialise
from sluice.rollout.engines.sglang.wire import RefusedError, Wire
from sluice.types import Version
from sluice.weights.base import Manifest, Published

LEAVING = 503


class Control:
    """One running server, by URL. The server is neither started nor ended here.

    Not safe for two calls at once: its owner holds a lock.

    Args:
        url: `http://host:port` of the server itself, not of a router.
        config: transport of the weights, sizes, deadlines.
        name: appears in errors and in `Capabilities`.
        api_key: bearer token; empty for none.
        model: folder of the model it serves, where known; None asks the server.
        device: an accelerator of this process that the server sees too: tensors go there, a bucket at a time, and
            to the server as IPC handles. `cpu` goes through shared memory.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        url: str,
        config: SGLangConfig,
        *,
        name: str,
        api_key: str = "",
        model: Path | None = None,
        device: str = "cpu",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url
        self.name = name
        self.unroutable = "no weights have been applied yet"
        """Why it may serve nothing; empty when it may."""
        self.label = ""
        """What the server calls the weights that it serves."""
        self.manifest: Manifest | None = None
        self.versions: dict[str, Version] = {}
        """By label, all that were applied here."""
        self.updating = False
        """A load is under way: the server's own name of its weights may be ahead of `label`."""
        self.held: PauseMode | None = None
        self.num_pauses = 0
        self.released: frozenset[Memory] = frozenset()
        """Parts of its memory that the server has given up."""
        self._config = config
        self._model = model
        self._device = device
        self._wire: Wire | None = Wire(url, api_key=api_key, seconds=config.control_seconds, transport=transport)
        self._server: Server | None = None

    async def start(self) -> Server:
        """Handshake; ends a pause that somebody left behind. Harmless when repeated.

        Raises:
            EngineError: nobody answers at the URL.
            CapabilityError: the server lacks a route, log-probs, or the transport of the weights.
        """
        if self._server is None:
            if self._config.sync == "tensor" and not is_local(httpx.URL(self.url).host):
                # a server that cannot attach to the shared memory does not say so: it dies
                raise CapabilityError(
                    f"{self.wire.where} is not on this machine, so tensors in shared memory do not reach it",
                    hint="set rollout.sglang.sync=disk, with the run folder on a file system that both see",
                )
            self._server = await shake_hands(self.wire, self.name, self._model)
        return self._server

    async def close(self) -> None:
        """Close the connections; the server stays as it is, paused or not."""
        wire, self._wire, self._server = self._wire, None, None
        if wire is not None:
            await wire.close()
            await asyncio.to_thread(free_unread)

    @property
    def wire(self) -> Wire:
        if self._wire is None:
            raise EngineError(f"the client of {self.url} is closed", hint="await start() first")
        return self._wire

    @property
    def server(self) -> Server:
        if self._server is None:
            raise EngineError(f"the client of {self.url} is not started, or closed", hint="await start() first")
        return self._server

    async def flush(self) -> None:
        """Forget all cached prefixes. EngineError while requests are running or kept with their KV cache."""
        await self.wire.post("/flush_cache")

    async def weights_label(self, seconds: float) -> str:
        """What the server calls its weights now. EngineError when it does not answer in time."""
        return str((await self.wire.get("/model_info", seconds=seconds)).get("weight_version"))

    async def is_leaving(self, seconds: float) -> bool:
        """Whether it was told to end, and does so when its requests have: `/health` is 503 then."""
        try:
            await self.wire.get("/health", seconds=seconds)
        except RefusedError as error:
            return error.status == LEAVING
        return False

    async def checksum(self) -> str | None:
        """Of the weights in the server's memory, under its own names; None when it cannot tell."""
        if not self.server.checks:
            return None
        reply = await self.wire.post("/weights_checker", {"action": "checksum"})
        return str(reply["per_engine_checksum"]) if "per_engine_checksum" in reply else None

    # ── pauses ──────────────────────────────────────────────────────────────────────────────────────────

    def refuse_mode(self, mode: PauseMode) -> None:
        """CapabilityError when the server does not know the mode."""
        if mode not in self.server.capabilities.pause_modes:
            known = ", ".join(sorted(self.server.capabilities.pause_modes))
            raise CapabilityError(f"{self.wire.where} cannot pause with {mode}", hint=f"it can with {known}")

    async def hold(self, mode: PauseMode, *, empty: bool = False) -> None:
        """Bring the server into `mode`. It may serve nothing when that fails half-way.

        Args:
            empty: a recompute pause is an abort as well, so that the server keeps no request.
        """
        wire, server = self.wire, self.server
        if self.held is mode and not empty:
            return
        self.num_pauses += 1
        word = "in_place" if mode is PauseMode.KEEP_KV else "abort"
        if mode is PauseMode.RECOMPUTE and server.retracts and not empty:
            word = "retract"
        try:
            if self.held is PauseMode.KEEP_KV and word == "abort":
                # an abort ends a running request in its next step, and a frozen one has none
                await wire.post("/continue_generation")
            self.held = mode
            await wire.post("/pause_generation", {"mode": word})
            # the reply to a pause comes before the scheduler has seen it; the reply to this comes after
            await wire.get("/server_info")
        except BaseException as error:
            self.unroutable = f"a pause failed: {error or type(error).__name__}"
            raise

    async def let_go(self) -> None:
        await self.wire.post("/continue_generation")
        self.held = None

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────

    async def release_memory(self) -> None:
        """Weights, KV cache and captured graphs; the server holds no request. Harmless when repeated.

        A server that keeps no account of its memory, such as SGLang's on a CPU, says yes and keeps it.
        """
        if not self.released:
            await self.wire.post("/release_memory_occupation", {})
            self.released = frozenset(Memory)

    async def resume_memory(self, part: Memory) -> None:
        """Take a part back, with it what depends on it. Harmless for a part that is there."""
        if part in self.released:
            alike = {Memory.WEIGHTS: ["weights"], Memory.KV: ["kv_cache", *self.server.graphs]}[part]
            await self.wire.post("/resume_memory_occupation", {"tags": alike})
            self.released -= {part}

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────

    async def load(self, published: Published) -> None:
        """Swap in a version: the server is held, and is so afterwards. Confirmed by the server's own label.

        Cached prefixes are forgotten; sequences held with `keep_kv` keep theirs, and new ones do not see it.

        What is not covered: the server ignores a tensor whose name its model lacks, and says so in its log
        only. Names are checked between versions, not against the model.

        Raises:
            WeightsError: the version is damaged, or the server refused it.
            EngineError: the server died or missed the deadline.
            After either, the server may serve nothing until a `load` succeeds.
        """
        manifest = published.manifest
        # the checksum tells this version from one of the same name that another run left at the server
        label = f"{manifest.version}+{manifest.checksum[:16]}"
        self.updating = True
        try:
            self._refuse_if_reshaped(manifest)
            if self.unroutable:
                await self._close_bracket()
            self.unroutable = self.unroutable or f"version {manifest.version} is being applied"
            if self._config.sync == "disk":
                await self._load_folder(published, label)
            else:
                await self._load_tensors(published, label)
            served = await self.weights_label(self._config.control_seconds)
            if served != label:
                raise RefusedError(f"{self.wire.where} calls its weights {served!r} after {label!r} was applied")
        except BaseException as error:
            self.unroutable = f"version {manifest.version} could not be applied: {error or type(error).__name__}"
            if isinstance(error, RefusedError):
                raise WeightsError(
                    f"{self.name} did not take version {manifest.version}: {error}", hint=error.hint
                ) from error
            raise
        else:
            self.manifest, self.label = manifest, label
            self.versions[label] = manifest.version
            self.unroutable = ""
        finally:
            self.updating = False

    async def _load_folder(self, published: Published, label: str) -> None:
        folder = await asyncio.to_thread(published.folder)
        body = {"model_path": str(folder.absolute()), "weight_version": label, "flush_cache": self._may_flush}
        try:
            await self.wire.post("/update_weights_from_disk", body)
        except RefusedError as error:
            hint = "rollout.sglang.sync=disk needs a folder that the server can read under the same path"
            raise RefusedError(str(error), hint=hint) from error

    async def _load_tensors(self, published: Published, label: str) -> None:
        """In buckets; only the last one flushes the prefix cache and names the version."""
        if self.server.bracketed:
            await self.wire.post("/begin_weight_update")
        last: list[tuple[str, Tensor]] = []
        for bucket in bucketed(promised(published), self._config.bucket_bytes):
            if last:
                await self._send(last, {"flush_cache": False})
            last = bucket
        await self._send(last, {"flush_cache": self._may_flush, "weight_version": label})
        if self.server.bracketed:
            await self.wire.post("/end_weight_update")

    async def _send(self, bucket: list[tuple[str, Tensor]], extra: Mapping[str, Any]) -> None:
        """One bucket, whose memory is freed on this side when the server has answered."""
        copies = [(name, tensor.detach().to(self._device, copy=True)) for name, tensor in bucket]
        texts = await asyncio.to_thread(serialise, copies, self.server.tp_size)
        try:
            await self.wire.post("/update_weights_from_tensor", {"serialized_named_tensors": texts, **extra})
        except BaseException:  # nobody may ever read them
            del copies
            free_unread()
            raise
        if self._device != "cpu":
            del copies
            devices.collect_shared()

    async def _close_bracket(self) -> None:
        """An update that was cut short, by this client or by one before it, may have left its bracket open."""
        if self.server.bracketed:
            try:
                await self.wire.post("/end_weight_update")
            except RefusedError:
                return  # there was none

    def _refuse_if_reshaped(self, manifest: Manifest) -> None:
        """Versions of one policy have the same tensors; a wrong one would end the server."""
        if self.manifest is None:
            return
        ours, theirs = (
            {(name, info.dtype, tuple(info.shape)) for name, info in which.tensors.items()}
            for which in (self.manifest, manifest)
        )
        if ours != theirs:
            odd = sorted(f"{name} {dtype}{list(shape)}" for name, dtype, shape in ours ^ theirs)
            raise WeightsError(
                f"version {manifest.version} does not have the tensors of version {self.manifest.version}: "
                f"{', '.join(odd[:4])}",
                hint="one engine serves one policy; restart it for another model",
            )

    @property
    def _may_flush(self) -> bool:
        return self.held is not PauseMode.KEEP_KV and Memory.KV not in self.released


def vocabulary(manifest: Manifest | None) -> int | None:
    """Rows of the input embedding; None when no weights of the usual name are known."""
    tensors = manifest.tensors.items() if manifest else ()
    return next((info.shape[0] for name, info in tensors if name.endswith("embed_tokens.weight")), None)
