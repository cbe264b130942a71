"""A judge that is served by Sluice's own gateway, over HTTP, by a scripted engine and by an untaught model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.scripted import OWNER, ScriptedEngine, SumDesk, make_chat, owner
from tests.tool_model import CONTEXT, SCRATCH

from sluice.config.gateway import GatewayConfig
from sluice.config.rewards import JudgeReward
from sluice.config.rollout import EmbeddedConfig
from sluice.errors import EngineError
from sluice.models.build import load_model, load_tokenizer, make_scratch
from sluice.rewards.base import VerifierFailure
from sluice.rewards.rubric import Rubric
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import Engine
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.rollout.gateway.desk import Lease, Wanted
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.session import Limits
from sluice.types import Message, Prompt, Reward, Version

ASK = "add {extracted} and {answer}"


class GreedyDesk(SumDesk):
    """Sessions at temperature 0, which a judge asks for: the gateway lets no client change a session's sampling."""

    async def lease(self, wanted: Wanted) -> Lease:
        lease = await super().lease(wanted)
        return replace(lease, sampling=replace(lease.sampling, temperature=0.0))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    return make_chat(tmp_path_factory.mktemp("chat"))


@asynccontextmanager
async def judge(
    engine: Engine, chat: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Rubric]]:
    """Makes rubrics whose judge is the engine behind a gateway that listens."""
    monkeypatch.setenv("SLUICE_OWNER_KEY", OWNER)
    gateway = Gateway(GatewayConfig(), engine=engine, chat=chat, limits=Limits(CONTEXT), desk=GreedyDesk())
    await gateway.start()
    try:
        async with httpx.AsyncClient(base_url=gateway.url, headers=owner(), timeout=30) as http:
            opened = await http.post("/sessions", json={"task": "sums"})
        monkeypatch.setenv("JUDGE_KEY", opened.json()["session_key"])
        base: dict[str, Any] = {"url": f"{gateway.url}/v1", "model": "actor", "prompt": ASK, "max_tokens": 12}
        yield lambda **more: Rubric([JudgeReward(api_key_env="JUDGE_KEY", **{**base, **more})])
    finally:
        await gateway.stop()


async def ask(rubric: Rubric, response: str = "3") -> Reward:
    prompt = Prompt("p7", "calc", (Message("user", "3 + 4 ="),), "4")
    try:
        async with asyncio.timeout(60):
            return await rubric.reward(prompt, response, episode_id="e")
    finally:
        await rubric.close()


def test_a_scripted_judge(chat: ChatRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = ScriptedEngine(chat)
        async with judge(engine, chat, monkeypatch) as make:
            engine.script = ["= 7"]
            reward = await ask(make(reply_pattern="= ([0-9])", high=9))
            assert reward.total == 7.0
            assert reward.notes["judge"]["said"] == "= 7"
            engine.script = ["add", "= 7"]
            assert (await ask(make(reply_pattern="= ([0-9])", high=9))).notes["judge"]["attempts"] == 2
            engine.script = ["add"] * 2
            with pytest.raises(VerifierFailure, match=r"no score in 2 replies.*The last one: str 'add'"):
                await ask(make(reply_pattern="= ([0-9])", attempts=2))
            engine.fault = EngineError("the engine is gone")
            with pytest.raises(VerifierFailure, match=r"gave no answer within 1 s.*status 5"):
                await ask(make(seconds=1.0, backoff_seconds=0.1))
            monkeypatch.setenv("JUDGE_KEY", "sk-wrong")
            with pytest.raises(VerifierFailure, match="refused with status 401") as refused:
                await ask(make())
            assert "sk-wrong" not in str(refused.value)

    asyncio.run(main())


def test_an_untaught_model_says_what_cannot_be_read(
    chat: ChatRenderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_scratch(SCRATCH, tmp_path / "model", seed=0)
    model = load_model(tmp_path / "model", dtype="float32", attn_implementation="sdpa")
    tokenizer = load_tokenizer(tmp_path / "model")

    async def main() -> None:
        config = EmbeddedConfig(kv_tokens=8192)
        engine = EmbeddedEngine(model, tokenizer, config, device="cpu", version=Version(0))
        await engine.start()
        try:
            async with judge(engine, chat, monkeypatch) as make:
                with pytest.raises(VerifierFailure, match="the judge actor gave no score in 2 replies"):
                    await ask(make(attempts=2))
        finally:
            await engine.close()

    asyncio.run(main())
