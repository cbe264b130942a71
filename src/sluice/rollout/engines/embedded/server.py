"""The embedded engine over HTTP: the subset of SGLang's routes that router, client and weight sync use.

    python -m sluice.rollout.engines.embedded.server --model FOLDER --port PORT [--config JSON]

A run starts such servers with `rollout.embedded.servers`; each is a process of its own, so that generation goes on
while the trainer computes. Two things differ from SGLang: a request may carry `noise_key`, which makes its draws
independent of batching, server and restarts, and an update is applied whole or not at all, because its buckets are
kept until the one that names the version.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from torch import Tensor
from transformers import AutoTokenizer

from sluice import __version__
from sluice.config.rollout import EmbeddedConfig
from sluice.errors import EngineError, SluiceError, Unroutable, WeightsError
from sluice.models.build import load_model
from sluice.rollout.engines.base import GenerateRequest, Generation, Memory, PauseMode
from sluice.rollout.engines.embedded.engine import EmbeddedEngine
from sluice.rollout.engines.embedded.received import Received, read_bucket, read_folder
from sluice.types import SamplingParams, Version, VersionSpan
from sluice.weights.store import checksum, tensor_info

PAUSES = {"abort": PauseMode.ABORT, "retract": PauseMode.RECOMPUTE, "in_place": PauseMode.KEEP_KV}
LEAVE_SECONDS = 8.0
"""After SIGTERM, for requests to end or to be taken elsewhere. Who stops a server of ours waits for longer."""
FIRST = "default"
"""What the weights are called that the server was started with, as with SGLang."""


class Generate(BaseModel):
    """Body of POST /generate; fields of SGLang that are not here are ignored."""

    input_ids: list[int]
    sampling_params: dict[str, Any] = {}
    rid: str = ""
    stream: bool = False
    return_logprob: bool = True
    return_sampling_mask: bool = False
    noise_key: int = 0


class Pause(BaseModel):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class Abort(BaseModel):
    rid: str = ""
    abort_all: bool = False


class Occupation(BaseModel):
    tags: list[Memory] | None = None


class FromTensor(BaseModel):
    serialized_named_tensors: list[str]
    weight_version: str | None = None
    flush_cache: bool = True


class FromDisk(BaseModel):
    model_path: str
    weight_version: str | None = None
    flush_cache: bool = True


class Checker(BaseModel):
    action: Literal["checksum"] = "checksum"


class Labels:
    """Names of versions at this server. Inside they are counted, so that no two that ever came look alike."""

    def __init__(self) -> None:
        self._names = [FIRST]

    @property
    def newest(self) -> str:
        return self._names[-1]

    def next(self) -> Version:
        return Version(len(self._names))

    def add(self, name: str) -> None:
        self._names.append(name)

    def of(self, version: Version) -> str:
        return self._names[version.step]


class Server:
    """The routes over one engine."""

    def __init__(self, engine: EmbeddedEngine, model: str, device: str) -> None:
        self.engine, self._model, self._device = engine, model, device
        self._labels = Labels()
        self._pending: dict[str, Tensor] = {}
        self._anonymous = itertools.count()
        self.leaving = False
        """It was told to end: whoever sends requests takes them elsewhere."""

    def app(self) -> FastAPI:
        app = FastAPI(title="Sluice embedded engine", version=__version__, docs_url=None, redoc_url=None)
        app.add_exception_handler(SluiceError, _refusal)
        gets: dict[str, Callable[..., Any]] = {
            "/health": self.health, "/model_info": self.model_info, "/server_info": self.server_info,
            "/v1/models": self.models, "/get_load": self.loads,
        }  # fmt: skip
        posts: dict[str, Callable[..., Any]] = {
            "/generate": self.generate, "/abort_request": self.abort, "/pause_generation": self.pause,
            "/continue_generation": self.go_on, "/flush_cache": self.flush,
            "/begin_weight_update": self.begin, "/end_weight_update": self.end,
            "/update_weights_from_tensor": self.from_tensor, "/update_weights_from_disk": self.from_disk,
            "/weights_checker": self.checker,
            "/release_memory_occupation": self.release_memory, "/resume_memory_occupation": self.resume_memory,
        }  # fmt: skip
        for path, handler in gets.items():
            app.add_api_route(path, handler, methods=["GET"], response_model=None)
        for path, handler in posts.items():
            app.add_api_route(path, handler, methods=["POST"], response_model=None)
        return app

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────────

    async def health(self) -> Response:
        await self.engine.start()  # raises when it is dead
        return Response(status_code=503 if self.leaving else 200)

    async def model_info(self) -> dict[str, Any]:
        return {
            "model_path": self._model, "served_model_name": self._model, "is_generation": True,
            "weight_version": self._labels.newest,
        }  # fmt: skip

    async def server_info(self) -> dict[str, Any]:
        return {
            **await self.model_info(), "version": f"embedded-{__version__}", "tp_size": 1, "dp_size": 1,
            "context_length": self.engine.context_length, "disaggregation_mode": "null", "internal_states": [{}],
            "sampling_mask_max_tokens": self.engine.vocab_size, "enable_memory_saver": True,
            "statistics": self.engine.statistics(),
        }  # fmt: skip

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self._model, "object": "model"}]}

    async def loads(self) -> list[dict[str, Any]]:
        now = self.engine.statistics()
        return [{"dp_rank": 0, "num_reqs": now["running"], "num_waiting_reqs": now["waiting"]}]

    # ── generation ──────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, body: Generate, request: Request) -> Response:
        body.rid = body.rid or f"anonymous-{next(self._anonymous)}"
        drawn = asyncio.Event()
        wanted = GenerateRequest(
            rid=body.rid,
            ids=np.asarray(body.input_ids, dtype=np.int32),
            sampling=sampling(body.sampling_params),
            noise_key=body.noise_key,
            on_tokens=(lambda _ids: drawn.set()) if body.stream else None,
        )
        work = asyncio.create_task(self.engine.generate(wanted))
        if body.stream:
            return StreamingResponse(self._events(work, body, drawn), media_type="text/event-stream")
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it; the request's KV is freed below
            return JSONResponse(self._answer(await work, len(body.input_ids)))
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _events(
        self, work: asyncio.Task[Generation], body: Generate, drawn: asyncio.Event
    ) -> AsyncIterator[bytes]:
        """Tokens as they are drawn, each event with the new ones alone; the last one has everything."""
        told, prompt = 0, len(body.input_ids)
        more = asyncio.create_task(drawn.wait())
        try:
            while not work.done():
                await asyncio.wait({work, more}, return_when=asyncio.FIRST_COMPLETED)
                now = None if work.done() else self.engine.so_far(body.rid)
                if now is not None:
                    drawn.clear()
                    more = asyncio.create_task(drawn.wait())
                    for part in _after(now, told):
                        told += len(part.ids)
                        yield _event(self._answer(part, prompt, told))
            try:
                answer = self._answer(work.result(), prompt)
            except SluiceError as error:
                answer = {"error": {"message": str(error), "code": 500}}
            yield _event(answer)
            yield b"data: [DONE]\n\n"
        finally:
            work.cancel()
            more.cancel()
            await asyncio.gather(work, more, return_exceptions=True)

    def _answer(self, done: Generation, prompt: int, told: int | None = None) -> dict[str, Any]:
        """A reply in SGLang's words; `told` counts the tokens so far where the turn goes on."""
        ids = done.ids.tolist()
        spans = [{"version": self._labels.of(s.version), "start": s.start, "end": s.end} for s in done.spans]
        meta: dict[str, Any] = {
            "finish_reason": {"type": done.finish.value} if told is None else None,
            "prompt_tokens": prompt,
            "completion_tokens": len(ids) if told is None else told,
            "cached_tokens": done.cached_tokens,
            "weight_version": spans[-1]["version"] if spans else self._labels.newest,
            "output_token_logprobs": [[value, id, None] for value, id in zip(done.logprobs.tolist(), ids, strict=True)],
        }
        if told is None:
            meta["weight_versions"] = spans
        if done.sampled_logprobs is not None:
            meta["output_token_sampling_logprobs"] = done.sampled_logprobs.tolist()
        return {"text": "", "output_ids": ids, "meta_info": meta}

    async def abort(self, body: Abort) -> dict[str, Any]:
        await self.engine.abort(None if body.abort_all else [body.rid])
        return {"success": True}

    # ── control ─────────────────────────────────────────────────────────────────────────────────────────

    async def pause(self, body: Pause) -> dict[str, Any]:
        await self.engine.pause(PAUSES[body.mode])
        return {"success": True}

    async def go_on(self) -> dict[str, Any]:
        await self.engine.resume()
        return {"success": True}

    async def release_memory(self, body: Occupation) -> dict[str, Any]:
        """Everything at once: a part alone is of no use to anybody."""
        if body.tags is not None and set(body.tags) != set(Memory):
            raise EngineError("only weights and kv_cache together can be released")
        await self.engine.release_memory()
        return {"success": True}

    async def resume_memory(self, body: Occupation) -> dict[str, Any]:
        for part in body.tags or Memory:
            await self.engine.resume_memory(part)
        return {"success": True}

    async def flush(self) -> dict[str, Any]:
        self.engine.forget_prefixes()
        return {"success": True}

    async def begin(self) -> dict[str, Any]:
        self._pending = {}
        return {"success": True}

    async def end(self) -> dict[str, Any]:
        """What arrived without a version to its name is left out."""
        self._pending = {}
        return {"success": True}

    async def from_tensor(self, body: FromTensor) -> dict[str, Any]:
        """A bucket is copied at once: its sender frees the memory when this returns."""
        if len(body.serialized_named_tensors) != 1:
            raise WeightsError(f"{len(body.serialized_named_tensors)} copies of a bucket for one rank")
        shared = await asyncio.to_thread(read_bucket, body.serialized_named_tensors[0])
        self._pending |= {name: tensor.to(self._device, copy=True) for name, tensor in shared}
        del shared
        if body.weight_version is not None:
            weights, self._pending = self._pending, {}
            await self._apply(body.weight_version, weights)
        return {"success": True}

    async def from_disk(self, body: FromDisk) -> dict[str, Any]:
        weights = await asyncio.to_thread(read_folder, Path(body.model_path))
        await self._apply(body.weight_version or body.model_path, weights)
        return {"success": True}

    async def _apply(self, label: str, weights: dict[str, Tensor]) -> None:
        received = await asyncio.to_thread(Received.of, self._labels.next(), weights)
        await self.engine.apply(received)
        self._labels.add(label)

    async def checker(self, body: Checker) -> dict[str, Any]:
        return {"success": True, "per_engine_checksum": await asyncio.to_thread(self._checksum)}

    def _checksum(self) -> str:
        return checksum({name: tensor_info(tensor) for name, tensor in self.engine.weights.items()})


def sampling(params: dict[str, Any]) -> SamplingParams:
    """SGLang's words for sampling. EngineError for a value that means nothing."""
    try:
        return SamplingParams(
            temperature=float(params.get("temperature", 1.0)),
            top_p=float(params.get("top_p", 1.0)),
            top_k=int(params.get("top_k", -1)),
            min_p=float(params.get("min_p", 0.0)),
            max_new_tokens=int(params.get("max_new_tokens", 128)),
            stop=tuple(params.get("stop") or ()),
            stop_token_ids=tuple(params.get("stop_token_ids") or ()),
        )
    except (TypeError, ValueError) as error:
        raise EngineError(f"sampling_params cannot be read: {error}") from error


async def _refusal(_request: Request, error: Exception) -> Response:
    status = 503 if isinstance(error, Unroutable) else 400
    return JSONResponse({"success": False, "message": str(error)}, status_code=status)


def _after(now: Generation, told: int) -> Iterator[Generation]:
    """What a turn so far has beyond its first `told` tokens, in parts that one version drew each."""
    for span in now.spans:
        start = max(span.start, told)
        if start < span.end:
            sampled = None if now.sampled_logprobs is None else now.sampled_logprobs[start : span.end]
            yield replace(
                now, ids=now.ids[start : span.end], logprobs=now.logprobs[start : span.end], sampled_logprobs=sampled,
                spans=(VersionSpan(0, span.end - start, span.version),),
            )  # fmt: skip


async def _gone(request: Request) -> None:
    """Until the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


class Leaving(uvicorn.Server):
    """Ends at SIGTERM when no request runs any more, or after `LEAVE_SECONDS`; until then it says that it leaves."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._leaver = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._leaver.leaving:
            super().handle_exit(sig, frame)
            return
        self._leaver.leaving = True
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + LEAVE_SECONDS

        def look() -> None:
            now = self._leaver.engine.statistics()
            if time.monotonic() < deadline and now["running"] + now["waiting"]:
                loop.call_later(0.05, look)
            else:
                super(Leaving, self).handle_exit(sig, frame)

        look()


def main() -> None:
    """Serve one model until SIGTERM."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--config", type=EmbeddedConfig.model_validate_json, default=EmbeddedConfig())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config: EmbeddedConfig = arguments.config
    model = load_model(arguments.model, dtype=config.dtype, attn_implementation="eager")
    engine = EmbeddedEngine(
        model, AutoTokenizer.from_pretrained(arguments.model), config, name=f"embedded at {arguments.port}",
        device=arguments.device, version=Version(0),
    )  # fmt: skip
    server = Server(engine, str(arguments.model), arguments.device)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its servers itself
    listening = uvicorn.Config(
        server.app(), host=arguments.host, port=arguments.port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    Leaving(listening, server).run()


if __name__ == "__main__":
    main()
