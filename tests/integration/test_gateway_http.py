"""The gateway over HTTP with a scripted engine: routes, bad input, limits, clients that leave or read slowly."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.scripted import CALL, OWNER, Rig, ScriptedEngine, SumDesk, bearer, make_chat, make_rig, owner
from tests.tool_model import ADD

from sluice.config.gateway import GatewayConfig
from sluice.errors import ConfigError, EngineError
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.gateway.desk import Wanted
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.session import Limits
from sluice.types import Outcome

USER = {"role": "user", "content": "add 3 4"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    return make_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(autouse=True)
def _owner_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_OWNER_KEY", OWNER)


def play(chat: ChatRenderer, scene: Callable[[Rig], Awaitable[None]], **config: Any) -> None:
    """Run a scene on a gateway of its own."""

    async def main() -> None:
        rig = make_rig(chat, **config)
        async with asyncio.timeout(60), rig.http:
            await scene(rig)
            await rig.gateway.stop()

    asyncio.run(main())


async def until(true: Callable[[], Any]) -> None:
    """Wait until it is. The scene has a deadline."""
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# ── sessions ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_session_from_opening_to_the_desk(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        opened = await rig.http.post("/sessions", json={"task": "sums", "metadata": {"x": 1}}, headers=owner())
        told = opened.json()
        assert opened.status_code == 201
        assert told["prompt"]["messages"] == [USER]
        assert told["openai_base_url"] == "http://test/v1"
        assert "the-secret-answer" not in opened.text
        id, key = told["episode_id"], bearer(told["session_key"])
        assert (await rig.http.post(CHAT, json={"messages": [USER]}, headers=key)).status_code == 200
        rewarded = await rig.http.post(f"/sessions/{id}/reward", json={"rewards": {"exact": 1}}, headers=owner())
        assert rewarded.json()["rewards"] == {"exact": 1.0}
        done = await rig.http.post(f"/sessions/{id}/finish", json={"rewards": {"style": 0.5}}, headers=owner())
        assert rig.engine.released == [id]
        assert done.json()["outcome"] == "completed"
        [(episode, rewards)] = rig.desk.finishes
        assert rewards == episode.info["rewards"] == {"exact": 1.0, "style": 0.5}
        again = await rig.http.post(f"/sessions/{id}/finish", json={}, headers=owner())
        assert again.status_code == 404
        assert (await rig.http.post(CHAT, json={"messages": [USER]}, headers=key)).status_code == 410
        listed = (await rig.http.get("/sessions", headers=owner())).json()["sessions"]
        assert [(one["episode_id"], one["state"], one["outcome"]) for one in listed] == [(id, "ended", "completed")]

    play(chat, scene)


def test_a_declared_fork_has_its_reason(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        id, key = await rig.open()
        await rig.http.post(CHAT, json={"messages": [USER]}, headers=key)
        forked = await rig.http.post(f"/sessions/{id}/fork", json={"reason": "summary"}, headers=owner())
        assert forked.status_code == 200
        await rig.http.post(CHAT, json={"messages": [{"role": "user", "content": "say 5"}]}, headers=key)
        seen = (await rig.http.get(f"/sessions/{id}", headers=owner())).json()
        assert [segment["fork"] and segment["fork"]["reason"] for segment in seen["segments"]][-1] == "summary"
        assert seen["counters"]["mismatches"] == 0

    play(chat, scene)


def test_idle_sessions_expire_and_are_recorded(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        await rig.gateway.start()
        id, key = await rig.open()
        await until(lambda: rig.desk.finishes)
        [(episode, _)] = rig.desk.finishes
        assert (episode.id, episode.outcome, episode.reason) == (id, Outcome.INFRA_FAILURE, "idle")
        assert (await rig.http.post(CHAT, json={"messages": [USER]}, headers=key)).status_code == 410

    play(chat, scene, idle_seconds=0.05)


def test_a_runner_gets_the_episode_of_a_session_that_expired(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        await rig.gateway.start()
        session, _ = rig.gateway.open(await rig.desk.lease(Wanted()))
        await until(lambda: rig.desk.finishes)
        episode = await rig.gateway.finish(session.id)
        assert episode.reason == "idle"

    play(chat, scene, idle_seconds=0.05)


def test_too_many_sessions_are_told_to_wait(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        answers = [await rig.http.post("/sessions", json={}, headers=owner()) for _ in range(1000)]
        assert [answer.status_code for answer in answers] == [201] * 20 + [429] * 980
        assert answers[-1].headers["retry-after"] == "3"
        assert rig.desk.leased == 20

    play(chat, scene, max_sessions=20, retry_after_seconds=3)


def test_stopping_records_what_is_open(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        await rig.open()
        await rig.gateway.stop()
        assert [episode.outcome for episode, _ in rig.desk.finishes] == [Outcome.ABORTED]

    play(chat, scene)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────


def test_streams_and_whole_answers_say_the_same(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        text = f"<think>3 + 4</think>\n{CALL}\n{CALL}"
        _, key = await rig.open()
        body = {"messages": [USER], "tools": [dict(ADD)]}
        rig.engine.script = [text, text]
        full = (await rig.http.post(CHAT, json=body, headers=key)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = await rig.http.post(CHAT, json={**body, **options}, headers=key)
        chunks = events_of(streamed.text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        message = full["choices"][0]["message"]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert (
            "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"] == "3 + 4"
        )
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call["index"] for call in calls] == [0, 1]
        assert [call["function"] for call in calls] == [call["function"] for call in message["tool_calls"]]
        assert chunks[-2]["choices"][0]["finish_reason"] == full["choices"][0]["finish_reason"] == "tool_calls"
        assert chunks[-1]["usage"] == full["usage"]
        assert streamed.text.endswith("data: [DONE]\n\n")

    play(chat, scene)


def test_n_stop_and_limits(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        _, key = await rig.open()
        rig.engine.script = ["= 1", "= 2", "= 3"]
        many = (await rig.http.post(CHAT, json={"messages": [USER], "n": 3}, headers=key)).json()
        assert [choice["message"]["content"] for choice in many["choices"]] == ["= 1", "= 2", "= 3"]
        rig.engine.script = ["say 1 2 3"]
        cut = await rig.http.post(CHAT, json={"messages": [USER], "max_tokens": 2}, headers=key)
        assert cut.json()["choices"][0]["finish_reason"] == "length"
        rig.engine.script = ["say 1 2 3"]
        plain = await rig.http.post("/v1/completions", json={"prompt": "add 3", "stop": " 2"}, headers=key)
        assert plain.json()["choices"][0]["text"] == "say 1"
        rig.engine.script = ["say 1 2 3"]
        body = {"messages": [USER], "max_tokens": 50, "stop_sequences": ["2"]}
        stopped = (await rig.http.post("/v1/messages", json=body, headers=key)).json()
        assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "2")

    play(chat, scene)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [USER]}),
        ("/v1/responses", {"input": "add 3 4"}),
        ("/v1/messages", {"messages": [USER], "max_tokens": 9}),
        ("/v1/completions", {"prompt": "add 3 4"}),
    ],
)
def test_an_engine_that_is_gone(chat: ChatRenderer, path: str, body: dict[str, Any]) -> None:
    async def scene(rig: Rig) -> None:
        _, key = await rig.open()
        rig.engine.fault = EngineError("embedded-0 has died")
        for stream in (False, True):
            answer = await rig.http.post(path, json={**body, "stream": stream}, headers=key)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
            assert "Traceback" not in answer.text
        rig.engine.fault = None
        assert (await rig.http.post(path, json=body, headers=key)).status_code == 200

    play(chat, scene)


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "empty"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": "hello"}', "messages"),
        (b'{"messages": [{"role": "wizard", "content": "x"}]}', "role"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', "no JSON"),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', "too large"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested"),
        (b"[" * 200_000, "nested"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "only text"),
        (b'{"messages": [{"role": "function", "content": "x"}]}', "before tools"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}', "tool_choice"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 5, "logprobs": true}', "top_logprobs"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 0}', "n:"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}', "max_tokens"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}',
            "only 'text'",
        ),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 0.3}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"5": 100}}', "logit_bias"),
    ],
)
def test_bad_bodies_are_400(chat: ChatRenderer, raw: bytes, said: str) -> None:
    async def scene(rig: Rig) -> None:
        id, key = await rig.open()
        answer = await rig.http.post(CHAT, content=raw, headers={**key, "content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert said in answer.json()["error"]["message"]
        seen = (await rig.http.get(f"/sessions/{id}", headers=owner())).json()
        assert seen["counters"]["turns"] == 0
        assert (await rig.http.post(CHAT, json={"messages": [USER]}, headers=key)).status_code == 200

    play(chat, scene)


def test_large_bodies_are_413_with_and_without_a_length(chat: ChatRenderer) -> None:
    async def chunks() -> Any:
        for _ in range(50):
            yield b" " * 1024**2

    async def scene(rig: Rig) -> None:
        _, key = await rig.open()
        await rig.gateway.start()
        declared = await rig.http.post(CHAT, content=b" " * (50 * 1024**2), headers=key)
        chunked = await rig.http.post(CHAT, content=chunks(), headers=key)
        assert [declared.status_code, chunked.status_code] == [413, 413]
        assert chunked.json()["error"]["code"] == "request_too_large"

    play(chat, scene)


def test_context_overflow_says_so_as_openai_does(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        _, key = await rig.open()
        long = {"role": "user", "content": "add 3 " * 3000}
        answer = await rig.http.post(CHAT, json={"messages": [long]}, headers=key)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        beside = await rig.http.post("/v1/messages", json={"messages": [long], "max_tokens": 5}, headers=key)
        assert beside.json()["type"] == "error"

    play(chat, scene)


def test_tool_arguments_that_are_no_json_go_on(chat: ChatRenderer) -> None:
    async def scene(rig: Rig) -> None:
        id, key = await rig.open()
        broken = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{oops"}}
        history = [USER, {"role": "assistant", "content": None, "tool_calls": [broken]}]
        history.append({"role": "tool", "tool_call_id": "c1", "content": "no JSON"})
        answer = await rig.http.post(CHAT, json={"messages": history, "tools": [dict(ADD)]}, headers=key)
        assert answer.status_code == 200, answer.text
        rig.engine.script = ["<tool_call>{add</tool_call>"]
        answer = await rig.http.post(CHAT, json={"messages": [USER], "tools": [dict(ADD)]}, headers=key)
        assert "<tool_call>{add</tool_call>" in answer.json()["choices"][0]["message"]["content"]
        seen = (await rig.http.get(f"/sessions/{id}", headers=owner())).json()
        assert seen["warnings"] == ["1 texts began like a tool call and were none"]

    play(chat, scene)


def test_a_mismatch_is_counted_logged_once_and_can_be_refused(
    chat: ChatRenderer, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(rig: Rig) -> None:
        id, key = await rig.open()
        await rig.http.post(CHAT, json={"messages": [USER]}, headers=key)
        edited = [USER, {"role": "assistant", "content": "= 8"}, USER]
        with caplog.at_level(logging.WARNING, "sluice"):
            for _ in range(2):
                assert (await rig.http.post(CHAT, json={"messages": edited}, headers=key)).status_code == 200
        seen = (await rig.http.get(f"/sessions/{id}", headers=owner())).json()
        assert seen["counters"]["mismatches"] >= 1
        assert "not the recorded ones" in seen["warnings"][0]
        assert len([record for record in caplog.records if id in record.message]) == 1

    play(chat, scene)


# ── clients that leave, or read slowly ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(chat: ChatRenderer, stream: bool) -> None:
    async def scene(rig: Rig) -> None:
        await rig.gateway.start()
        id, key = await rig.open()
        rig.engine.hold.clear()
        body = json.dumps({"messages": [USER], "stream": stream}).encode()
        port = rig.gateway.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: {key['authorization']}\r\n"
        writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: rig.engine.running)
        if stream:
            assert b"200 OK" in await reader.readline()
        writer.close()
        await until(lambda: rig.engine.cancelled)
        rig.engine.hold.set()
        await until(lambda: not rig.gateway.book.by_id(id).session.in_flight)
        assert rig.gateway.book.by_id(id).session.counters()["turns"] == 0
        assert (await rig.http.post(CHAT, json={"messages": [USER]}, headers=key)).status_code == 200

    play(chat, scene)


def test_a_reader_that_never_reads_blocks_nobody(chat: ChatRenderer) -> None:
    """The application is called as a server would call it; the client's buffers are full from the first byte on."""

    async def scene(rig: Rig) -> None:
        slow, slow_key = await rig.open()
        _, key = await rig.open()
        stuck = asyncio.Event()

        async def send(message: Any) -> None:
            stuck.set()
            await asyncio.Event().wait()

        body = [{"type": "http.request", "body": json.dumps({"messages": [USER], "stream": True}).encode()}]
        left = asyncio.Event()

        async def receive() -> Any:
            if body:
                return body.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": CHAT, "raw_path": CHAT.encode(), "root_path": "", "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in slow_key.items()],
        }  # fmt: skip
        rig.engine.script = ["say 1 2 3 4 5 6 7 8 9"]
        call = asyncio.create_task(rig.gateway.app(scope, receive, send))  # pyright: ignore[reportArgumentType]
        await stuck.wait()
        assert (await rig.http.post(CHAT, json={"messages": [USER]}, headers=key)).status_code == 200
        session = rig.gateway.book.by_id(slow).session
        await until(lambda: not session.in_flight)  # the answer does not wait for its reader
        assert session.counters()["turns"] == 1
        left.set()
        await call

    play(chat, scene)


def test_a_port_that_is_taken(chat: ChatRenderer) -> None:
    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            config = GatewayConfig(port=taken.getsockname()[1])
            gateway = Gateway(config, engine=ScriptedEngine(chat), chat=chat, limits=Limits(64), desk=SumDesk())
            with pytest.raises(ConfigError, match=r"cannot listen on .* port"):
                await gateway.start()

    asyncio.run(scene())


def test_the_document_names_what_is_there(chat: ChatRenderer, tmp_path: Path) -> None:
    async def scene(rig: Rig) -> None:
        made = (await rig.http.get("/openapi.json")).json()
        assert {CHAT, "/v1/messages", "/v1/responses", "/sessions/{id}/finish"} <= made["paths"].keys()
        assert (await rig.http.get("/nowhere")).status_code == 404
        assert (await rig.http.put(CHAT)).status_code == 405
        models = await rig.http.get("/v1/models", headers=owner())
        assert [one["id"] for one in models.json()["data"]] == ["actor"]
        assert (await rig.http.get("/health")).json()["status"] == "ok"
        for header in (
            {"authorization": "Bearer \xff\xfe"},
            {"x-api-key": "'; DROP TABLE"},
            {"authorization": "Basic x"},
        ):
            raw = {name: value.encode("latin-1") for name, value in header.items()}
            assert (await rig.http.post(CHAT, json={}, headers=raw)).status_code == 401

    play(chat, scene)
