"""Rewards over HTTP against a server that behaves badly: a failure is a failure, with its reason, and never a 0."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError
from tests.unit.answering import Answering, answering

from sluice.config.rewards import HttpReward, RewardConfig
from sluice.errors import RewardError
from sluice.rewards.base import VerifierFailure
from sluice.rewards.rubric import Rubric
from sluice.types import Message, Prompt, Reward

QUICK = {"seconds": 5.0, "attempt_seconds": 2.0, "backoff_seconds": 0.001}


def prompt(**metadata: Any) -> Prompt:
    messages = (Message("system", "Add."), Message("user", "6 * 7 ="))
    return Prompt("p7", "calc", messages, "42", metadata)


@contextlib.asynccontextmanager
async def rubric(config: RewardConfig) -> AsyncIterator[Rubric]:
    made = Rubric([config])
    try:
        yield made
    finally:
        await made.close()


def ask(*script: Any, response: str = "it is <a>42</a>", **config: Any) -> tuple[Reward, Answering]:
    async def main() -> tuple[Reward, Answering]:
        async with (
            asyncio.timeout(30),
            answering(*script) as server,
            rubric(HttpReward(url=f"{server.url}/score", **{**QUICK, **config})) as made,
        ):
            return await made.reward(prompt(level=2), response, episode_id="g000001.0"), server

    return asyncio.run(main())


def failure(*script: Any, **config: Any) -> str:
    with pytest.raises(VerifierFailure) as caught:
        ask(*script, **config)
    return str(caught.value)


def test_what_is_sent_and_what_comes_back() -> None:
    reward, server = ask(
        {"reward": 0.25, "style": 1, "short": True, "why": ["too long"]}, pattern="<a>(.*?)</a>", weight=2.0
    )
    assert reward.total == 0.5
    assert reward.components == {"http": 0.25, "http/style": 1.0, "http/short": 1.0}
    assert reward.weights == {"http": 2.0, "http/style": 0.0, "http/short": 0.0}
    assert reward.notes == {"http": {"why": ["too long"]}}
    (asked,) = server.asked
    assert asked.path == "/score"
    assert "authorization" not in asked.headers
    assert asked.body == {
        "prompt": "6 * 7 =", "prompt_id": "p7", "answer": "42", "task": "calc", "metadata": {"level": 2},
        "messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": "6 * 7 ="}],
        "episode_id": "g000001.0", "response": "it is <a>42</a>", "extracted": "42",
    }  # fmt: skip


def test_what_passes_is_tried_again() -> None:
    reward, server = ask(
        "close", (503, {"detail": "starting"}, {}), "cut", (429, {}, {"Retry-After": "0"}), {"reward": 1}
    )
    assert reward.total == 1.0
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {"detail": "no key"}, {}), 'refused with status 401: {"detail": "no key"}'),
        ((422, b"", {}), "refused with status 422: nothing"),
        ((302, b"", {"Location": "/other"}), "refused with status 302"),
        (b"I would give this a 7.", "answered with what is no JSON: I would give this a 7."),
        (b'{"reward": NaN}', "returned float nan, which is no finite number"),
        ({"reward": "1"}, "returned str '1', which is no finite number"),
        ({"reward": None}, "returned NoneType None"),
        (b'{"reward": 1, "style": Infinity}', "returned float inf as 'style'"),
        ({"score": 1}, "answered with dict {'score': 1}, not with"),
        ([1], "answered with list [1], not with"),
        (b"{" * 5_000_000, "answered with more than 4194304 bytes"),
    ],
)
def test_what_is_no_score_is_a_failure_at_once(answer: Any, said: str) -> None:
    message = failure(answer, {"reward": 1})
    assert said in message, "and nothing was tried again"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("close", "at last it could not be reached: Server disconnected"),
        ("hang", "at last it did not answer within"),
        ((500, b"Traceback: boom", {}), "at last it answered with status 500: Traceback: boom"),
        ((429, {}, {"Retry-After": "3600"}), "in one attempt; at last it answered with status 429"),
    ],
)
def test_what_does_not_pass_is_a_failure_at_the_deadline(answer: Any, said: str) -> None:
    message = failure(answer, seconds=1.0, attempt_seconds=0.3)
    assert "gave no answer within 1 s" in message
    assert said in message


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        config = HttpReward(url=f"http://127.0.0.1:{taken.getsockname()[1]}", seconds=1.0, backoff_seconds=0.1)

        async def main() -> None:
            async with rubric(config) as made:
                await made.reward(prompt(), "42", episode_id="e")

        with pytest.raises(VerifierFailure, match="could not be reached"):
            asyncio.run(main())


def test_the_key_is_sent_and_told_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SCORER_KEY", "sk-very-secret")
    _, server = ask({"reward": 1}, api_key_env="MY_SCORER_KEY")
    assert server.asked[0].headers["authorization"] == "Bearer sk-very-secret"
    message = failure((403, b"bad key sk-very-secret", {}), api_key_env="MY_SCORER_KEY")
    assert "sk-very-secret" not in message
    assert "bad key [MY_SCORER_KEY]" in message
    monkeypatch.delenv("MY_SCORER_KEY")
    with pytest.raises(RewardError, match=r"(?s)reward 'http': api_key_env names MY_SCORER_KEY.*not set.*export"):
        Rubric([HttpReward(url="http://localhost:1", api_key_env="MY_SCORER_KEY")])


def test_hundreds_of_episodes_open_few_connections() -> None:
    async def main() -> Answering:
        async with answering({"reward": 1}) as server, asyncio.timeout(60):
            async with rubric(HttpReward(url=server.url, concurrent=8, **QUICK)) as made:
                server.hold = asyncio.Event()
                calls = [asyncio.create_task(made.reward(prompt(), "42", episode_id=f"e{n}")) for n in range(300)]
                while server.most_open < 8:  # noqa: ASYNC110 - the server counts, it has nothing to set
                    await asyncio.sleep(0)
                server.hold.set()
                assert {reward.total for reward in await asyncio.gather(*calls)} == {1.0}
            return server

    server = asyncio.run(main())
    assert server.most_open == 8
    assert len(server.asked) == 300


def test_bad_config() -> None:
    with pytest.raises(ValidationError, match="is no URL"):
        HttpReward(url="localhost:80")
    with pytest.raises(RewardError, match="metadata of prompt p7 cannot be sent as JSON"):
        Rubric([HttpReward(url="http://localhost:1")]).check_prompts([prompt(bad={1, 2})])
