"""The engine protocol: what the loop and the runners ask of anything that generates tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

from sluice.types import Floats, Ids, Routes, SamplingParams, Version, VersionSpan


class Finish(StrEnum):
    """Why a generation ended. ABORT is never the model's own end."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class PauseMode(StrEnum):
    """What a pause does to running sequences.

    * recompute: kept as tokens; after `resume` they are prefilled again under the weights then active,
      so every later log-prob belongs to one version. The default.
    * keep_kv: kept with their KV cache; later tokens attend to keys of older weights.
    * abort: ended with `Finish.ABORT` and returned as they are.
    """

    RECOMPUTE = "recompute"
    KEEP_KV = "keep_kv"
    ABORT = "abort"


class Memory(StrEnum):
    """What an engine gives up and takes back of its device's memory, in the order in which it is taken back."""

    WEIGHTS = "weights"
    KV = "kv_cache"


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """One sampled continuation of `ids`.

    Attributes:
        rid: names the request; `abort` takes it. Unique among running requests.
        ids: context, shape `[n]`.
        sampling: how to draw.
        noise_key: 64-bit key of the sampling noise. With the position it determines the draw, so results
            depend neither on batching nor on the order of requests. Engines that cannot key their noise
            say so in `Capabilities.keyed_noise`.
        routing_key: keeps requests together at one engine: an episode id. Empty: anywhere.
        on_tokens: called in the event loop with the ids drawn since the last call, as they are drawn, and for
            the last time before `generate` returns; together they are `Generation.ids`. A turn that is cut by
            a weight swap or by an engine's death goes on: what was told once is never taken back.
        routes_from: first position whose experts are wanted, see `Generation.routes`; None: not wanted.
    """

    rid: str
    ids: Ids
    sampling: SamplingParams
    noise_key: int = 0
    routing_key: str = ""
    on_tokens: Callable[[Sequence[int]], None] | None = None
    routes_from: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What came back. Arrays have shape `[new tokens]`; spans tile them.

    Attributes:
        logprobs: log-softmax(logits / T) of each drawn token, before top-p/top-k/min-p.
        sampled_logprobs: of the distribution drawn from; None when it is the same one.
        cached_tokens: context tokens that were not computed again.
        routes: experts of the positions from `GenerateRequest.routes_from` to the last but one of context and
            new tokens together (the last one was never an input); None when not wanted.
        engine: name of the engine that served the last piece.
    """

    ids: Ids
    logprobs: Floats
    spans: tuple[VersionSpan, ...]
    finish: Finish
    sampled_logprobs: Floats | None = None
    cached_tokens: int = 0
    routes: Routes | None = None
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do, told at the handshake. What a run needs and an engine lacks is refused there."""

    name: str
    engine_version: str
    context_length: int
    logprobs: bool = True
    version_spans: bool = True
    keyed_noise: bool = False
    bracketed_updates: bool = False
    pause_modes: frozenset[PauseMode] = field(default_factory=lambda: frozenset(PauseMode))
    routed_experts: bool = False
    memory_release: bool = False


class Engine(Protocol):
    """An engine serves one policy. Every method raises EngineError within its own deadline."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> Version | None:
        """Weights that are being served; None before the first activation."""
        ...

    async def start(self) -> Capabilities:
        """Handshake; the engine is ready to serve when this returns."""
        ...

    async def generate(self, request: GenerateRequest) -> Generation: ...

    async def abort(self, rids: Sequence[str] | None = None) -> None:
        """End these requests, or all, with `Finish.ABORT`. Unknown ids are ignored."""
        ...

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None:
        """Stop drawing tokens. Returns when nothing is being computed; new requests wait."""
        ...

    async def resume(self) -> None: ...

    async def release(self, routing_key: str) -> None:
        """No more requests come with this key: the episode has ended. Unknown keys are ignored."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class Yielding(Engine, Protocol):
    """An engine that can leave its devices to somebody else, and come back to them."""

    async def drain(self) -> None:
        """Pause, and keep nothing of running turns at the device: after `resume` they go on from their tokens."""
        ...

    async def release_memory(self) -> None:
        """Give up weights and KV cache. The engine is drained, and stays so.

        Raises:
            CapabilityError: it cannot (`Capabilities.memory_release`).
        """
        ...

    async def resume_memory(self, part: Memory) -> None:
        """Take one part back: the weights, whose values are lost until `Sink.apply`, and after that the KV cache."""
        ...
