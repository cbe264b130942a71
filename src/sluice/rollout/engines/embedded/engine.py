"""The embedded engine: the `Engine` protocol and the `Sink` protocol over scheduler, runner and sampler.

One background task runs steps and lets the event loop turn between them:

    generate ──► queue ──► step: schedule → forward → draw → accept ──► future of the finished request
                  ▲          waits for: work, and not paused
                  └── unblocked by: generate, resume

Everything happens in the thread of one event loop, so nothing is ever being computed when a method of this
class runs: `pause` takes effect at once, and a weight update sees no half-done step. The way to stop is
`close`; an exception in a step kills the engine, and every call, waiting or later, gets it as EngineError.
"""

from __future__ import annotations

import asyncio
from collections import abc
from pathlib import Path
from typing import Self

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from sluice import device as devices
from sluice.config.rollout import EmbeddedConfig
from sluice.errors import EngineError, Unroutable, WeightsError
from sluice.models.names import checkpoint_views
from sluice.rollout.engines.base import Capabilities, Finish, GenerateRequest, Generation, Memory, PauseMode
from sluice.rollout.engines.embedded.activate import activate
from sluice.rollout.engines.embedded.admission import Limits, admit, context_length
from sluice.rollout.engines.embedded.kv import BlockPool
from sluice.rollout.engines.embedded.runner import Runner, engine_model
from sluice.rollout.engines.embedded.sampler import draw
from sluice.rollout.engines.embedded.scheduler import Scheduler
from sluice.rollout.engines.embedded.sequence import Sequence
from sluice.rollout.engines.embedded.stop import Decoder, stop_text
from sluice.types import Version
from sluice.weights.base import Published


class EmbeddedEngine:
    """Generates with an ordinary Hugging Face causal language model, in this process.

    Args:
        model: becomes the engine's own: attention is replaced, gradients are switched off, weights are
            overwritten by `apply`. For a model that somebody else uses, see `from_model`.
        tokenizer: decodes tokens in the search for stop strings; None when nobody uses them.
        config: sizes and dtype.
        name: appears in errors and in `Capabilities`.
        device: torch device of weights and cache.
        version: which version the model's weights are. None: nothing is served until `apply` succeeds.

    Raises:
        EngineError: the model is not one of full causal attention over a standard KV cache, or the sizes in
            `config` cannot work.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Decoder | None,
        config: EmbeddedConfig,
        *,
        name: str = "embedded-0",
        device: torch.device | str = "cpu",
        version: Version | None = None,
    ) -> None:
        num_blocks = config.kv_tokens // config.block_tokens
        if num_blocks < 1:
            raise EngineError(
                f"a KV cache of {config.kv_tokens} tokens holds no block of {config.block_tokens}",
                hint="raise rollout.embedded.kv_tokens or lower rollout.embedded.block_tokens",
            )
        self._name = name
        self._version = version
        self._tokenizer = tokenizer
        self._runner = Runner(
            model,
            num_blocks=num_blocks,
            block_tokens=config.block_tokens,
            dtype=getattr(torch, config.dtype),
            device=torch.device(device),
            context_length=config.context_length,
        )
        self._weights = checkpoint_views(self._runner.model)
        self._missing: set[Memory] = set()
        self._limits = Limits(
            context_length=context_length(config.context_length, self._runner.context_length, self._runner.name),
            kv_tokens=num_blocks * config.block_tokens,
            vocab_size=self._runner.vocab_size,
            stop_strings=tokenizer is not None,
        )
        self._pool = BlockPool(num_blocks, config.block_tokens)
        self._scheduler = Scheduler(
            self._pool,
            max_running=config.max_running,
            prefill_tokens=config.prefill_tokens,
            context_length=self._limits.context_length,
        )
        self._calls: dict[str, tuple[Sequence, asyncio.Future[Generation]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._paused = False
        self._closed = False
        self._dead: Exception | None = None
        self._unroutable: Exception | None = None
        self._counts = dict.fromkeys(("steps", "generated_tokens", "prefill_tokens"), 0)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel | Path | str,
        tokenizer: Decoder | None,
        config: EmbeddedConfig,
        *,
        name: str = "embedded-0",
        device: torch.device | str = "cpu",
        version: Version | None = None,
    ) -> Self:
        """An engine with a copy of its own of `model`, or of the model in a Hugging Face folder."""
        own = engine_model(model, dtype=config.dtype)
        return cls(own, tokenizer, config, name=name, device=device, version=version)

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> Version | None:
        """None also after a failed update: nothing is being served then."""
        return None if self._unroutable else self._version

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens, context and answer."""
        return self._limits.context_length

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return self._limits.vocab_size

    @property
    def weights(self) -> abc.Mapping[str, torch.Tensor]:
        """Those in memory, under their checkpoint names; not to be written to."""
        return self._weights

    async def start(self) -> Capabilities:
        """Start the step loop; calling it again is harmless.

        Raises:
            EngineError: the engine is closed or dead.
        """
        self._refuse_if_gone()
        self._ensure_running()
        return Capabilities(
            name=self._name,
            engine_version=f"transformers {transformers.__version__}",
            context_length=self._limits.context_length,
            keyed_noise=True,
            memory_release=True,
        )

    async def generate(self, request: GenerateRequest) -> Generation:
        """Generate one continuation; waits while the engine is paused. Cancelling the call frees its KV.

        A turn that reaches the engine's context length ends with `Finish.LENGTH`.

        Raises:
            EngineError: the request can never be served as it is, or the engine is closed or dead.
            Unroutable: no version is being served: none was applied yet, or the last update failed.
        """
        self._refuse_if_gone()
        self._refuse_if_unroutable()
        if request.rid in self._calls:
            raise EngineError(f"a request named {request.rid!r} is already running")
        longest = admit(request, self._limits)
        search = stop_text(request.sampling, self._tokenizer, len(request.ids))
        seq = Sequence(request, max_tokens=longest, stop_text=search)
        self._ensure_running()
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._calls[request.rid] = seq, future
        self._scheduler.add(seq)
        self._work.set()
        try:
            return await future
        finally:
            if self._calls.get(request.rid, (None,))[0] is seq:
                self._forget(seq)

    def so_far(self, rid: str) -> Generation | None:
        """What has been drawn for a request that is under way, `Finish.ABORT`; None when it is not."""
        found = self._calls.get(rid)
        return found[0].generation(Finish.ABORT) if found else None

    def forget_prefixes(self) -> None:
        """New requests find no cached prefix of earlier ones."""
        self._pool.invalidate()

    async def abort(self, rids: abc.Sequence[str] | None = None) -> None:
        """End these requests, or all, with `Finish.ABORT` and the tokens drawn so far."""
        for rid in list(self._calls) if rids is None else list(rids):
            if rid in self._calls:
                self._finish(self._calls[rid][0], Finish.ABORT)

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None:
        """Stop drawing tokens. `abort` ends waiting requests too. Pausing twice applies the later mode."""
        self._refuse_if_gone()
        self._paused = True
        if mode is PauseMode.ABORT:
            await self.abort()
        elif mode is PauseMode.RECOMPUTE:
            self._scheduler.retract()

    async def resume(self) -> None:
        """Go on drawing tokens. EngineError while a part of the memory is released."""
        self._refuse_if_gone()
        if self._missing:
            raise EngineError(f"{self._name} cannot go on without its {sorted(self._missing)[0]}, which was released")
        self._paused = False
        self._work.set()

    async def drain(self) -> None:
        """See `Yielding.drain`."""
        await self.pause(PauseMode.RECOMPUTE)

    async def release_memory(self) -> None:
        """Give up weights and KV cache: what runs is kept as tokens, and waits."""
        await self.drain()
        if not self._missing:
            self._missing = set(Memory)
            self._pool.invalidate()
            self._weights = {}
            self._runner.free_weights()
            self._runner.cache.free()
            devices.free_cached(self._runner.device)

    async def resume_memory(self, part: Memory) -> None:
        """See `Yielding.resume_memory`; harmless for a part that is there."""
        self._refuse_if_gone()
        if part not in self._missing:
            return
        if part is Memory.WEIGHTS:
            self._runner.allocate_weights()
            self._weights = checkpoint_views(self._runner.model)
            self._version = None
        else:
            self._runner.cache.allocate()
        self._missing.discard(part)

    async def apply(self, published: Published) -> None:
        """Swap in a version, verified before anything is touched and again after it was copied.

        While serving, the engine pauses with `recompute`, swaps and resumes. Cached prefixes are forgotten;
        sequences paused with `keep_kv` keep theirs.

        Raises:
            WeightsError: the version does not fit or is damaged. The engine serves nothing until a later
                `apply` succeeds; requests in flight get Unroutable.
            EngineError: the engine is closed or dead.
        """
        self._refuse_if_gone()
        if Memory.WEIGHTS in self._missing:
            raise EngineError(f"{self._name} has no memory for weights: they were released")
        if not self._paused:
            self._scheduler.retract()
        version = published.manifest.version
        try:
            activate(self._weights, published)
        except Exception as error:
            self._unroutable = error
            self._fail_calls(self._unroutable_error)
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"{self._name} could not apply version {version}: {error!r}") from error
        self._pool.invalidate()
        self._version = version
        self._unroutable = None
        self._work.set()

    async def release(self, routing_key: str) -> None:
        """Nothing is kept by key."""

    async def close(self) -> None:
        """End the step loop; requests in flight get EngineError. Calling it again is harmless."""
        self._closed = True
        task, self._task = self._task, None
        self._fail_calls(lambda: EngineError(f"{self._name} was closed"))
        if task is not None and task.get_loop() is asyncio.get_running_loop():
            task.cancel()
            await asyncio.wait([task])

    def statistics(self) -> dict[str, float]:
        """Counters since construction, and what is going on now.

        `prefill_tokens` are context and recomputed tokens, `cached_tokens` those taken from the cache
        instead; `kv_usage` is the fraction of blocks that sequences hold.
        """
        return {
            **self._counts,
            "cached_tokens": self._scheduler.num_cached_tokens,
            "preemptions": self._scheduler.num_preemptions,
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "kv_usage": self._pool.num_used / self._pool.num_blocks,
            "kv_blocks_used": self._pool.num_used,
        }

    # ── the step loop ───────────────────────────────────────────────────────────────────────────────────

    def _ensure_running(self) -> None:
        """Start the step loop in this event loop, unless it runs already. EngineError when in another."""
        loop = asyncio.get_running_loop()
        if self._task is not None and not self._task.done() and not self._task.get_loop().is_closed():
            if self._task.get_loop() is loop:
                return
            raise EngineError(f"{self._name} already runs in another event loop")
        self._work = asyncio.Event()
        self._task = loop.create_task(self._run(), name=f"{self._name} steps")

    async def _run(self) -> None:
        try:
            while True:
                if self._paused or self._scheduler.idle:
                    self._work.clear()
                    await self._work.wait()
                else:
                    self._step()
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - whatever a step raised becomes every caller's EngineError
            self._dead = error
            self._fail_calls(self._dead_error)
        finally:
            self._fail_calls(lambda: EngineError(f"the event loop that ran {self._name} ended"))

    def _step(self) -> None:
        chunks = self._scheduler.schedule()
        logits = self._runner.forward(chunks, self._scheduler.table)
        drawing = [chunk.seq for chunk in chunks if chunk.draws]
        prefilled = (chunk for chunk in chunks if chunk.end - chunk.start > 1 or chunk.start < chunk.seq.context)
        self._counts["steps"] += 1
        self._counts["prefill_tokens"] += sum(chunk.end - chunk.start for chunk in prefilled)
        self._counts["generated_tokens"] += len(drawing)
        if not drawing:
            return
        with torch.inference_mode():
            drawn = draw(
                logits,
                [seq.sampling for seq in drawing],
                np.array([seq.noise_key for seq in drawing], dtype=np.uint64),
                np.array([len(seq.tokens) for seq in drawing], dtype=np.int64),
            )
        version = self._version
        assert version is not None  # generate refuses until there is one, and it is never taken back
        for seq, token, logprob, sampled in zip(drawing, *drawn, strict=True):
            finish = seq.accept(token, logprob, sampled, version)
            if (tell := seq.request.on_tokens) is not None:
                asyncio.get_running_loop().call_soon(tell, [int(token)])  # its failure is not the engine's
            if finish is not None:
                self._finish(seq, finish)

    def _finish(self, seq: Sequence, finish: Finish) -> None:
        _, future = self._calls[seq.rid]
        self._forget(seq)
        if not future.done():
            future.set_result(seq.generation(finish))

    def _forget(self, seq: Sequence) -> None:
        del self._calls[seq.rid]
        self._scheduler.remove(seq)

    def _fail_calls(self, error: abc.Callable[[], EngineError]) -> None:
        for seq, future in list(self._calls.values()):
            self._forget(seq)
            if not future.done() and not future.get_loop().is_closed():
                future.set_exception(error())

    # ── refusals ────────────────────────────────────────────────────────────────────────────────────────

    def _refuse_if_gone(self) -> None:
        if self._dead is not None:
            raise self._dead_error()
        if self._closed:
            raise EngineError(f"{self._name} was closed")

    def _dead_error(self) -> EngineError:
        error = EngineError(
            f"{self._name} died in a step: {type(self._dead).__name__}: {self._dead}",
            hint="see the error it was raised from; the engine must be made anew",
        )
        error.__cause__ = self._dead
        return error

    def _refuse_if_unroutable(self) -> None:
        if self._unroutable is not None:
            raise self._unroutable_error()
        if self._version is None:
            raise Unroutable(
                f"{self._name} serves no version yet",
                hint="apply a published version, or pass version= when the model's weights are to be served",
            )

    def _unroutable_error(self) -> Unroutable:
        error = Unroutable(
            f"{self._name} serves nothing: its last weight update failed ({self._unroutable})",
            hint="apply a version that fits",
        )
        error.__cause__ = self._unroutable
        return error
