"""Unmodified clients, streaming and not: a conversation of three questions with tool calls is exactly one segment."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tool_model import ADD, CONTEXT

from sluice.config.gateway import ChatConfig, GatewayConfig
from sluice.config.rollout import EmbeddedConfig
from sluice.models.build import load_model, load_tokenizer
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.rollout.gateway.desk import Lease
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.session import Limits
from sluice.types import Author, Episode, Message, Prompt, SamplingParams, Version

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm fetches a price list from the network otherwise

import agents
import anthropic
import litellm
import openai

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

QUESTIONS = ("add 3 4", "think add 2 6", "add 1 5 and 9 8")
ANSWERS = ["= 7", "= 8", "= 6 17"]
SYSTEM = "You are an agent. Use the tool."

Talk = Callable[[str, str, bool], Awaitable[list[str]]]
"""Has the conversation at a URL with a key, streaming or not, and returns the three final answers."""


@asynccontextmanager
async def serving(model: Path) -> AsyncIterator[Gateway]:
    """A gateway over the embedded engine."""
    tokenizer = load_tokenizer(model)
    config = EmbeddedConfig(kv_tokens=8192)
    network = load_model(model, dtype="float32", attn_implementation="sdpa")
    engine = EmbeddedEngine.from_model(network, tokenizer, config, version=Version(0))
    await engine.start()
    chat = ChatRenderer(tokenizer, ChatConfig(format="qwen"))
    gateway = Gateway(GatewayConfig(), engine=engine, chat=chat, limits=Limits(CONTEXT))
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()
        await engine.close()


def lease(chat: ChatRenderer, id: str) -> Lease:
    sampling = SamplingParams(temperature=0.0, max_new_tokens=80, stop_token_ids=chat.eos)
    return Lease(id, "g0", Prompt("p", "sums", (Message("user", "add"),)), sampling, lambda turn: 0)


def run_tool(arguments: str | dict[str, Any]) -> str:
    values = json.loads(arguments) if isinstance(arguments, str) else arguments
    return str(values["a"] + values["b"])


# ── the clients ─────────────────────────────────────────────────────────────────────────────────────────


async def talk_openai_chat(url: str, key: str, stream: bool) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:

        async def create(history: list[Any]) -> Any:
            if not stream:
                done = await client.chat.completions.create(model="m", messages=history, tools=[ADD])  # pyright: ignore[reportArgumentType]
                return done.choices[0].message
            async with client.chat.completions.stream(model="m", messages=history, tools=[ADD]) as events:  # pyright: ignore[reportArgumentType]
                async for _ in events:
                    pass
                return (await events.get_final_completion()).choices[0].message

        return await chat_loop(create, lambda message: message.model_dump(exclude_none=True))


async def talk_litellm_chat(url: str, key: str, stream: bool) -> list[str]:
    return await litellm_loop("openai/m", f"{url}/v1", key, stream)


async def talk_litellm_anthropic(url: str, key: str, stream: bool) -> list[str]:
    return await litellm_loop("anthropic/m", url, key, stream)


async def litellm_loop(model: str, base: str, key: str, stream: bool) -> list[str]:
    async def create(history: list[Any]) -> Any:
        answer: Any = await litellm.acompletion(
            model=model, messages=history, tools=[dict(ADD)], api_base=base, api_key=key, stream=stream, timeout=60,
            max_tokens=80,
        )  # fmt: skip
        if stream:
            answer = litellm.stream_chunk_builder([chunk async for chunk in answer], messages=history)
        return answer.choices[0].message

    return await chat_loop(create, lambda message: message.model_dump(exclude_none=True))


async def chat_loop(create: Callable[[list[Any]], Awaitable[Any]], back: Callable[[Any], Any]) -> list[str]:
    history: list[Any] = [{"role": "system", "content": SYSTEM}]
    finals: list[str] = []
    for question in QUESTIONS:
        history.append({"role": "user", "content": question})
        for _ in range(4):
            message = await create(history)
            history.append(back(message))
            if not message.tool_calls:
                finals.append(message.content)
                break
            for call in message.tool_calls:
                history.append({"role": "tool", "tool_call_id": call.id, "content": run_tool(call.function.arguments)})
    return finals


async def talk_openai_responses(url: str, key: str, stream: bool) -> list[str]:
    tool = {"type": "function", "name": "add", "parameters": ADD["function"]["parameters"], "strict": False}
    finals: list[str] = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        previous: str | None = None
        for question in QUESTIONS:
            items: Any = question
            for _ in range(4):
                settings: Any = {"model": "m", "input": items, "tools": [tool], "instructions": SYSTEM}
                settings["previous_response_id"] = previous
                if stream:
                    async with client.responses.stream(**settings) as events:
                        async for _ in events:
                            pass
                        response = await events.get_final_response()
                else:
                    response = await client.responses.create(**settings)
                previous = response.id
                calls = [item for item in response.output if item.type == "function_call"]
                if not calls:
                    finals.append(response.output_text)
                    break
                items = [
                    {"type": "function_call_output", "call_id": call.call_id, "output": run_tool(call.arguments)}
                    for call in calls
                ]
    return finals


async def talk_anthropic(url: str, key: str, stream: bool) -> list[str]:
    tools: Any = [{"name": "add", "description": "Add.", "input_schema": ADD["function"]["parameters"]}]
    history: list[Any] = []
    finals: list[str] = []
    async with anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0, timeout=60) as client:
        for question in QUESTIONS:
            history.append({"role": "user", "content": question})
            for _ in range(4):
                settings: Any = {"model": "m", "max_tokens": 80, "messages": history, "tools": tools, "system": SYSTEM}
                counted = await client.messages.count_tokens(model="m", messages=history, tools=tools, system=SYSTEM)
                if stream:
                    async with client.messages.stream(**settings) as events:
                        async for _ in events:
                            pass
                        message = await events.get_final_message()
                else:
                    message = await client.messages.create(**settings)
                read = message.usage.cache_read_input_tokens or 0
                assert counted.input_tokens == message.usage.input_tokens + read
                history.append({"role": "assistant", "content": message.content})
                calls: list[Any] = [block for block in message.content if block.type == "tool_use"]
                if not calls:
                    finals.append("".join(block.text for block in message.content if block.type == "text"))
                    break
                results = [
                    {"type": "tool_result", "tool_use_id": call.id, "content": run_tool(call.input)} for call in calls
                ]
                history.append({"role": "user", "content": results})
    return finals


@agents.function_tool
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


async def talk_agents_chat(url: str, key: str, stream: bool) -> list[str]:
    return await agents_loop(url, key, stream, agents.OpenAIChatCompletionsModel)


async def talk_agents_responses(url: str, key: str, stream: bool) -> list[str]:
    return await agents_loop(url, key, stream, agents.OpenAIResponsesModel)


async def agents_loop(url: str, key: str, stream: bool, kind: Any) -> list[str]:
    agents.set_tracing_disabled(True)
    finals: list[str] = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        model = kind(model="m", openai_client=client)
        agent = agents.Agent(name="agent", instructions=SYSTEM, model=model, tools=[add])
        history: list[Any] = []
        for question in QUESTIONS:
            history.append({"role": "user", "content": question})
            if stream:
                result: Any = agents.Runner.run_streamed(agent, history)
                async for _ in result.stream_events():
                    pass
            else:
                result = await agents.Runner.run(agent, history)
            finals.append(str(result.final_output))
            history = result.to_input_list()
    return finals


CLIENTS: tuple[Talk, ...] = (
    talk_openai_chat,
    talk_openai_responses,
    talk_anthropic,
    talk_agents_chat,
    talk_agents_responses,
    talk_litellm_chat,
    talk_litellm_anthropic,
)


# ── what was recorded ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("talk", CLIENTS, ids=lambda talk: talk.__name__.removeprefix("talk_"))
def test_three_questions_are_one_segment(talk: Talk, stream: bool, tool_model: Path) -> None:
    async def scene() -> tuple[list[str], Episode, dict[str, int], ChatRenderer]:
        async with serving(tool_model) as gateway:
            session, key = gateway.open(lease(gateway.chat, "e1"))
            async with asyncio.timeout(120):
                finals = await talk(gateway.url, key, stream)
            counters = session.counters()
            return finals, await gateway.finish("e1"), counters, gateway.chat

    finals, episode, counters, chat = asyncio.run(scene())
    assert finals == ANSWERS
    assert counters["mismatches"] == counters["malformed_calls"] == counters["sampling_flagged"] == 0
    assert {name: count for name, count in counters.items() if name.startswith("forks/")} == {}
    assert len(episode.segments) == 1
    turns = episode.segments[0].turns
    assert [turn.author for turn in turns] == [Author.OBSERVED, Author.SAMPLED] * 6
    sampled = [chat.text(turn.ids) for turn in episode.sampled_turns()]
    assert sampled[1::2] == ANSWERS
    assert sampled[2].startswith("<think>2 + 6</think>")
    assert sampled[4].count("<tool_call>") == 2
    assert episode.outcome == "completed"


def test_the_client_sees_the_recorded_tokens(tool_model: Path) -> None:
    """`return_token_ids` and `logprobs` are the recorded ones, streaming or not."""

    async def scene() -> None:
        async with serving(tool_model) as gateway:
            session, key = gateway.open(lease(gateway.chat, "e1"))
            async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
                messages: Any = [{"role": "user", "content": QUESTIONS[0]}]
                extra = {"return_token_ids": True}
                done = await client.chat.completions.create(
                    model="m", messages=messages, tools=[ADD], logprobs=True, extra_body=extra  # pyright: ignore[reportArgumentType]
                )  # fmt: skip
                events = await client.chat.completions.create(
                    model="m", messages=messages, tools=[ADD], logprobs=True, extra_body=extra, stream=True  # pyright: ignore[reportArgumentType]
                )  # fmt: skip
                last = [chunk async for chunk in events][-1]
            episode = await gateway.finish("e1")
            turns = list(episode.sampled_turns())
            assert len(turns) == 2
            for turn, choice in zip(turns, (done.choices[0], last.choices[0]), strict=True):
                assert choice.model_extra is not None
                assert choice.model_extra["token_ids"] == turn.ids.tolist()
                assert choice.logprobs is not None
                assert choice.logprobs.content is not None
                assert turn.logprobs is not None
                np.testing.assert_allclose([one.logprob for one in choice.logprobs.content], turn.logprobs, atol=1e-6)
            assert session.closed

    asyncio.run(scene())
