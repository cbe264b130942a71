"""A scripted engine and sessions over it: what is drawn is chosen by the test, everything else is real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from chat_rig import renderer

from sluice.rollout.chat.base import ChatMessage, ToolCall, ToolSpec
from sluice.rollout.engines.base import Capabilities, Finish, GenerateRequest, Generation, PauseMode
from sluice.rollout.runners.base import turn_noise
from sluice.rollout.session import Ask, Choice, Limits, Session
from sluice.types import (
    Author,
    Episode,
    Ids,
    Message,
    Prompt,
    Routes,
    SamplingParams,
    Version,
    VersionSpan,
    expand,
)

CHAT = renderer("thinking")
V0 = Version(0)
USER = ChatMessage("user", "what is this?")
ADD: ToolSpec = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "number"}}},
    },
}


class Script:
    """Draws what `write` says: a text, which the model then ends, or ids as they are.

    Attributes:
        requests, answers: what was asked and what came back, in the order of the answers.
        gate: closed by a test that wants requests to wait for it.
    """

    def __init__(self, write: Callable[[GenerateRequest], str | Sequence[int]] | Sequence[str | Sequence[int]]) -> None:
        if callable(write):
            self._write = write
        else:
            texts = iter(write)
            self._write = lambda _: next(texts)
        self.requests: list[GenerateRequest] = []
        self.answers: list[Generation] = []
        self.started = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.finish = Finish.STOP
        self.failure: Exception | None = None
        self._aborted: set[str] = set()
        self._waiting: dict[str, asyncio.Event] = {}

    name = "script"
    version: Version | None = V0

    async def start(self) -> Capabilities:
        return Capabilities("script", "1", 10_000)

    async def generate(self, request: GenerateRequest) -> Generation:
        self.started += 1
        wake = self._waiting[request.rid] = asyncio.Event()
        try:
            waits = [asyncio.ensure_future(self.gate.wait()), asyncio.ensure_future(wake.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=30)
            finally:
                for wait in waits:
                    wait.cancel()
        finally:
            del self._waiting[request.rid]
        if self.failure is not None:
            raise self.failure
        written = self._write(request)
        ids = [*CHAT.encode(written).tolist(), CHAT.eos[0]] if isinstance(written, str) else list(written)
        finish = Finish.ABORT if request.rid in self._aborted else self.finish
        if request.on_tokens is not None:
            for at in range(0, len(ids), 3):
                request.on_tokens(ids[at : at + 3])
        n, end = len(ids), len(request.ids) + len(ids) - 1
        routes = None
        if request.routes_from is not None:
            routes = Routes(request.routes_from, 1, 1, np.zeros(end - request.routes_from, np.int16))
        answer = Generation(
            np.asarray(ids, np.int32), np.full(n, -0.5, np.float32), (VersionSpan(0, n, V0),), finish, routes=routes
        )
        self.requests.append(request)
        self.answers.append(answer)
        return answer

    async def abort(self, rids: Sequence[str] | None = None) -> None:
        for rid in rids if rids is not None else list(self._waiting):
            self._aborted.add(rid)
            self._waiting[rid].set()

    async def pause(self, mode: PauseMode = PauseMode.RECOMPUTE) -> None:
        self.gate.clear()

    async def resume(self) -> None:
        self.gate.set()

    async def release(self, routing_key: str) -> None: ...

    async def close(self) -> None: ...

    async def until_started(self, count: int) -> None:
        """Let the loop turn until this many requests came."""
        async with asyncio.timeout(30):
            while self.started < count:  # noqa: ASYNC110 - turns of the loop, not time
                await asyncio.sleep(0)


def make(engine: Any, *, chat: Any = CHAT, sampling: SamplingParams | None = None, **settings: Any) -> Session:
    limits = {"context_length": 10_000, **settings.pop("limits", {})}
    return Session(
        id="e1",
        group_id="g000000",
        prompt=Prompt("p7", "calc", (Message("user", "?"),)),
        sampling=sampling or SamplingParams(temperature=0.8),
        engine=engine,
        chat=chat,
        limits=Limits(**limits),
        noise=turn_noise(0, "p7"),
        **settings,
    )


def said(choice: Choice, *, reasoning: bool = True) -> ChatMessage:
    """A faithful client's memory of an answer."""
    parsed = choice.parsed
    thought = parsed.reasoning if reasoning else ""
    return ChatMessage("assistant", parsed.content, reasoning=thought, tool_calls=parsed.tool_calls)


def answered(call: ToolCall, text: str) -> ChatMessage:
    return ChatMessage("tool", text, tool_call_id=call.id, name=call.name)


async def one(session: Session, *messages: ChatMessage, **settings: Any) -> Choice:
    (choice,) = await session.ask(Ask(tuple(messages), **settings))
    return choice


def check(episode: Episode, engine: Script) -> None:
    """Every segment is what the engine was given and what it gave back, and every sampled token is trained once."""
    given = [np.concatenate([asked.ids, got.ids]) for asked, got in zip(engine.requests, engine.answers, strict=True)]
    seen: list[int] = []
    for index, segment in enumerate(episode.segments):
        whole: Ids = episode.ids(index)
        at = episode.start(index)
        for turn in segment.turns:
            at += len(turn)
            if turn.author is Author.SAMPLED:
                source = next(n for n, got in enumerate(engine.answers) if got.ids is turn.ids)
                seen.append(source)
                assert whole[:at].tolist() == given[source].tolist()
        assert segment.turns
        assert segment.turns[-1].author is Author.SAMPLED
    assert len(seen) == len(set(seen)) == sum(1 for _ in episode.sampled_turns())
    samples = expand(episode)
    assert sum(sample.num_trained_tokens for sample in samples) == sum(len(engine.answers[n].ids) for n in seen)
