"""An agent that holds its own session's key tries to reward itself, to read others, and to find a key anywhere."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from tests.scripted import OWNER, ScriptedEngine, make_chat, make_rig, owner

from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import GenerateRequest, Generation

USER = {"role": "user", "content": "add 3 4"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    return make_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(autouse=True)
def _owner_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_OWNER_KEY", OWNER)


def test_its_key_is_good_for_its_model_calls_alone(chat: ChatRenderer) -> None:
    async def scene() -> None:
        rig = make_rig(chat)
        mine, key = await rig.open()
        other, other_key = await rig.open()
        await rig.http.post(CHAT, json={"messages": [{"role": "user", "content": "say 9"}]}, headers=other_key)
        attempts = [
            ("POST", f"/sessions/{mine}/reward", {"rewards": {"exact": 1.0}}),
            ("POST", f"/sessions/{mine}/finish", {"outcome": "completed", "rewards": {"exact": 1.0}}),
            ("POST", f"/sessions/{mine}/fork", {"reason": "retry"}),
            ("POST", f"/sessions/{other}/finish", {"outcome": "infra_failure"}),
            ("POST", "/sessions", {"task": "sums"}),
            ("GET", "/sessions", None),
            ("GET", f"/sessions/{mine}", None),
            ("GET", f"/sessions/{other}", None),
        ]
        for method, path, body in attempts:
            answer = await rig.http.request(method, path, json=body, headers=key)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied"), path
            bare = await rig.http.request(method, path, json=body)
            assert bare.status_code == 401, path
            assert bare.headers["www-authenticate"] == "Bearer"
        for field in ("session", "session_id", "episode_id", "user", "rid", "routing_key"):  # the key alone says whose
            answer = await rig.http.post(CHAT, json={"messages": [USER], field: other}, headers=key)
            assert answer.status_code == 200
        answer = await rig.http.post(CHAT, json={"messages": [USER]}, headers={**key, "x-smg-routing-key": other})
        assert answer.status_code == 200
        assert rig.gateway.book.by_id(other).session.counters()["turns"] == 1
        assert rig.gateway.book.by_id(mine).rewards == {}
        assert len(rig.gateway.book) == 2
        assert (await rig.http.post(CHAT, json={"messages": [USER]}, headers=owner())).status_code == 403
        await rig.gateway.stop()

    asyncio.run(scene())


def test_another_sessions_answers_are_not_to_be_had(chat: ChatRenderer) -> None:
    async def scene() -> None:
        rig = make_rig(chat)
        _, key = await rig.open()
        _, other_key = await rig.open()
        secret = await rig.http.post("/v1/responses", json={"input": "say 9"}, headers=other_key)
        body = {"input": "say 1", "previous_response_id": secret.json()["id"]}
        stolen = await rig.http.post("/v1/responses", json=body, headers=key)
        assert stolen.status_code == 400
        assert (await rig.http.post("/v1/responses", json=body, headers=other_key)).status_code == 200
        await rig.gateway.stop()

    asyncio.run(scene())


class Overhearing(ScriptedEngine):
    """Keeps what the engine, and so a router's headers, is told of a call."""

    def __init__(self, chat: ChatRenderer) -> None:
        super().__init__(chat)
        self.told: list[str] = []

    async def generate(self, request: GenerateRequest) -> Generation:
        self.told.append(f"{request.rid} {request.routing_key}")
        return await super().generate(request)


def test_no_key_is_anywhere(chat: ChatRenderer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    async def scene() -> list[str]:
        engine = Overhearing(chat)
        rig = make_rig(chat, engine)
        id, key = await rig.open()
        secret = key["authorization"].removeprefix("Bearer ")
        for headers in (key, {"x-api-key": secret}):
            seen.append((await rig.http.post(CHAT, json={"messages": [USER]}, headers=headers)).text)
        bad = [{"messages": 5}, {"messages": [{"role": "x", "content": secret[:0]}]}]
        for body in bad:
            seen.append((await rig.http.post(CHAT, json=body, headers=key)).text)
        for path in (
            "/",
            "/metrics",
            "/openapi.json",
            "/sessions",
            f"/sessions/{id}",
            "/v1/models",
            "/health",
            "/docs",
        ):
            answer = await rig.http.get(path, headers=owner())
            seen.append(answer.text + str(answer.headers))
        seen.append((await rig.http.get("/metrics", headers=key)).text)
        assert id not in seen[-1]
        finished = await rig.http.post(f"/sessions/{id}/finish", json={}, headers=owner())
        seen.append(finished.text)
        [(episode, _)] = rig.desk.finishes
        seen.append(repr(episode))
        seen.extend(engine.told)
        assert all(told.split()[1] == id for told in engine.told)
        return [secret, OWNER]

    keys = asyncio.run(scene())
    seen += [record.getMessage() + (record.exc_text or "") for record in caplog.records]
    for key in keys:
        for text in seen:
            assert key not in text
            assert key.removeprefix("sk-sluice-") not in text


def test_only_hashes_are_kept(chat: ChatRenderer) -> None:
    async def scene() -> None:
        rig = make_rig(chat)
        _, key = await rig.open()
        secret = key["authorization"].removeprefix("Bearer ")
        assert len(secret) > 40
        book = rig.gateway.book
        [entry] = book
        assert secret not in repr(vars(book)) + repr(entry.key_hash)
        assert len(entry.key_hash) == 32
        keys = {(await rig.open())[1]["authorization"] for _ in range(100)}
        assert len(keys) == 100
        await rig.gateway.stop()

    asyncio.run(scene())


def test_an_error_of_ours_shows_no_traceback(chat: ChatRenderer, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> httpx.Response:
        rig = make_rig(chat)
        _, key = await rig.open()
        rig.engine.fault = ZeroDivisionError("at /home/somebody/secret.py")
        answer = await rig.http.post(CHAT, json={"messages": [USER]}, headers=key)
        await rig.gateway.stop()
        return answer

    answer = asyncio.run(scene())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "ZeroDivisionError" in caplog.text  # the log has it
    assert all(OWNER not in record.getMessage() for record in caplog.records)
