"""A gateway for tests of its HTTP surface: an engine that says what it is told, and a desk that leases sums."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from sluice.config.gateway import ChatConfig, GatewayConfig
from sluice.models.build import load_tokenizer, make_scratch
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import Capabilities, Finish, GenerateRequest, Generation, PauseMode
from sluice.rollout.gateway.desk import Lease, Wanted
from sluice.rollout.gateway.errors import Busy, UnknownTask
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.session import Limits
from sluice.types import Episode, Message, Prompt, SamplingParams, Version, VersionSpan
from tests.tool_model import SCRATCH

OWNER = "sk-owner-of-tests"
CALL = '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>'


def make_chat(folder: Path) -> ChatRenderer:
    """The tool model's chat template, without a taught model."""
    make_scratch(SCRATCH, folder / "blank", seed=0)
    return ChatRenderer(load_tokenizer(folder / "blank"), ChatConfig(format="qwen"))


class ScriptedEngine:
    """Says `script`'s next text, token by token, one turn of the event loop each.

    Attributes:
        script: texts to say; when it is empty, `= 7`.
        hold: while it is clear, nothing is said after the first token.
        fault: raised in place of the next answers.
        released: routing keys that ended, in order.
    """

    name = "scripted"
    version = Version(3)

    def __init__(self, chat: ChatRenderer) -> None:
        self.chat = chat
        self.script: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.fault: Exception | None = None
        self.running: set[str] = set()
        self.cancelled: list[str] = []
        self.released: list[str] = []

    async def start(self) -> Capabilities:
        return Capabilities("scripted", "1", 2048)

    async def generate(self, request: GenerateRequest) -> Generation:
        if self.fault is not None:
            raise self.fault
        text = self.script.pop(0) if self.script else "= 7"
        ids = [*self.chat.encode(text).tolist(), self.chat.eos[0]]
        finish = Finish.STOP
        if len(ids) > request.sampling.max_new_tokens:
            ids, finish = ids[: request.sampling.max_new_tokens], Finish.LENGTH
        self.running.add(request.rid)
        try:
            for at, id in enumerate(ids):
                if at == 1:
                    await self.hold.wait()
                await asyncio.sleep(0)
                if request.on_tokens is not None:
                    request.on_tokens([id])
        except asyncio.CancelledError:
            self.cancelled.append(request.rid)
            raise
        finally:
            self.running.discard(request.rid)
        spans = (VersionSpan(0, len(ids), self.version),)
        logprobs = np.full(len(ids), -0.5, np.float32)
        return Generation(np.asarray(ids, np.int32), logprobs, spans, finish, cached_tokens=len(request.ids) // 2)

    async def abort(self, rids: Sequence[str] | None = None) -> None:
        return

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None:
        return

    async def resume(self) -> None:
        return

    async def release(self, routing_key: str) -> None:
        self.released.append(routing_key)

    async def close(self) -> None:
        return


@dataclass
class SumDesk:
    """Leases up to `most` prompts of the task `sums`."""

    most: int = 1_000_000
    leased: int = 0
    finishes: list[tuple[Episode, dict[str, float]]] = field(default_factory=list)

    async def lease(self, wanted: Wanted) -> Lease:
        if wanted.task not in ("", "sums"):
            raise UnknownTask(f"there is no task {wanted.task[:40]!r}")
        if self.leased >= self.most:
            error = Busy("nothing to lease now")
            error.retry_after = 2
            raise error
        self.leased += 1
        metadata: dict[str, Any] = {"level": 1, **wanted.metadata}
        messages = wanted.messages or (Message("user", "add 3 4"),)
        prompt = Prompt(f"p{self.leased}", "sums", messages, answer="the-secret-answer", metadata=metadata)
        return Lease(f"g0.{self.leased}", "g0", prompt, SamplingParams(max_new_tokens=64), lambda turn: 0)

    async def finished(self, episode: Episode, rewards: Mapping[str, float]) -> None:
        self.finishes.append((episode, dict(rewards)))


@dataclass
class Rig:
    """A gateway, its engine and desk, and a client without a key."""

    gateway: Gateway
    engine: ScriptedEngine
    desk: SumDesk
    http: httpx.AsyncClient

    async def open(self) -> tuple[str, dict[str, str]]:
        """A new session: its id and the headers of its calls."""
        answer = await self.http.post("/sessions", json={"task": "sums"}, headers=owner())
        assert answer.status_code == 201, answer.text
        return answer.json()["episode_id"], bearer(answer.json()["session_key"])


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def owner() -> dict[str, str]:
    return bearer(OWNER)


def make_rig(chat: ChatRenderer, engine: ScriptedEngine | None = None, **config: Any) -> Rig:
    """A gateway that listens nowhere: the client calls the application. OWNER must be in SLUICE_OWNER_KEY."""
    engine, desk = engine or ScriptedEngine(chat), SumDesk()
    gateway = Gateway(GatewayConfig(**config), engine=engine, chat=chat, limits=Limits(2048), desk=desk)
    gateway.name_url("http://test")
    transport = httpx.ASGITransport(app=gateway.app, raise_app_exceptions=False)
    return Rig(gateway, engine, desk, httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20))
