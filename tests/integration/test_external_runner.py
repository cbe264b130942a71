"""Agents elsewhere: they lease episodes over HTTP, talk, are rewarded by their owner, and the run trains on it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from tests.integration.runner_rig import config, episodes, rewards

from sluice.config import RunConfig
from sluice.obs.summary import Summary
from sluice.obs.view import NullView
from sluice.orchestrate.folder import open_folder
from sluice.orchestrate.inline import InlineRun
from sluice.orchestrate.placement import place
from sluice.types import Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OWNER = "owner-key-of-the-test"
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}


class Watch(NullView):
    """Waits for the gateway's address among what a person is told."""

    def __init__(self) -> None:
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def log(self, message: str) -> None:
        if message.startswith("gateway at "):
            self.url.set_result(message.removeprefix("gateway at "))


def run_with(run: RunConfig, client: Any) -> Summary:
    """The run, and beside it `client(http)`; both must end."""

    async def both() -> Summary:
        watch = Watch()
        folder = open_folder(run, resume=False, overwrite=False)
        with place(run, folder, "cpu", watch.log) as placement:
            training = asyncio.ensure_future(InlineRun(run, folder, watch, resume=False, placement=placement).run())
            return await attended(watch, training)

    async def attended(watch: Watch, training: asyncio.Future[Summary]) -> Summary:
        async with asyncio.timeout(240):
            await asyncio.wait({training, watch.url}, return_when=asyncio.FIRST_COMPLETED)
            headers = {"Authorization": f"Bearer {OWNER}"}
            async with httpx.AsyncClient(base_url=watch.url.result(), headers=headers, timeout=60) as http:
                agent = asyncio.ensure_future(client(http, training))
                summary = await training
                await agent
            return summary

    return asyncio.run(both())


async def lease(http: httpx.AsyncClient, training: asyncio.Future[Summary]) -> dict[str, Any] | None:
    """The next episode; None when the run is over. A 429 says when to come back."""
    while not training.done():
        try:
            reply = await http.post("/sessions", json={})
        except httpx.TransportError:  # the run is over and its gateway with it
            return None
        if reply.status_code == 201:
            return reply.json()
        assert reply.status_code == 429, reply.text
        assert int(reply.headers["retry-after"]) >= 1
        await asyncio.wait({training}, timeout=0.05)
    return None


async def talk(http: httpx.AsyncClient, opened: dict[str, Any]) -> str:
    """One tool conversation with the session's own key."""
    key = {"Authorization": f"Bearer {opened['session_key']}"}
    messages: list[dict[str, Any]] = list(opened["prompt"]["messages"])
    for _ in range(3):
        body = {"model": "actor", "messages": messages, "tools": [ADD]}
        reply = await http.post("/v1/chat/completions", json=body, headers=key)
        assert reply.status_code == 200, reply.text
        message = reply.json()["choices"][0]["message"]
        if not message.get("tool_calls"):
            return message["content"] or ""
        messages.append(message)
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in message["tool_calls"]]
    return ""


async def work(http: httpx.AsyncClient, training: asyncio.Future[Summary]) -> None:
    """Lease, talk, reward, finish, until the run is over."""
    while (opened := await lease(http, training)) is not None:
        said = await talk(http, opened)
        id = opened["episode_id"]
        reply = await http.post(f"/sessions/{id}/reward", json={"rewards": {"reward": float(said.endswith("3"))}})
        assert reply.status_code == 200, reply.text
        reply = await http.post(f"/sessions/{id}/finish", json={"rewards": {"style": 0.5}})
        assert reply.status_code == 200, reply.text


@pytest.fixture
def external(tmp_path: Path, tool_model: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("SLUICE_OWNER_KEY", OWNER)
    given = [{"type": "given"}, {"type": "given", "name": "style", "component": "style"}, {"type": "random"}]
    return config(tmp_path, tool_model, {"type": "external"}, rewards=given)


def changed(run: RunConfig, **changes: Any) -> RunConfig:
    return run.model_copy(update=changes)


def test_an_agent_elsewhere_is_trained(external: RunConfig) -> None:
    summary = run_with(external, work)
    assert summary.steps == 2
    assert summary.logprob_mismatch_mean_abs < 1e-4
    found, given = episodes(external), rewards(external)
    assert len(found) == len(given) == 8
    assert all(episode.outcome is Outcome.COMPLETED for episode in found.values())
    assert all(len(episode.segments) == 1 for episode in found.values())
    assert {reward.components["style"] for reward in given.values()} == {0.5}
    assert {reward.components["given"] for reward in given.values()} == {1.0}, "the tool model repeats what it is told"


def test_a_lease_that_is_not_kept_is_an_infra_failure(external: RunConfig) -> None:
    """One agent takes an episode and never comes back; the others are trained without it."""
    runner = external.rollout.runner.model_copy(update={"lease_seconds": 20.0})
    run = changed(external, steps=1, rollout=external.rollout.model_copy(update={"runner": runner}))

    async def one_forgets(http: httpx.AsyncClient, training: asyncio.Future[Summary]) -> None:
        assert await lease(http, training) is not None
        await work(http, training)

    run_with(run, one_forgets)
    outcomes = [episode.outcome for episode in episodes(run).values()]
    assert outcomes.count(Outcome.INFRA_FAILURE) == 1
    (lost,) = [each for each in episodes(run).values() if each.outcome is Outcome.INFRA_FAILURE]
    assert lost.reason == "not finished within 20 s of its lease"
    assert lost.id not in rewards(run)


def test_what_may_be_leased(external: RunConfig) -> None:
    async def asks(http: httpx.AsyncClient, training: asyncio.Future[Summary]) -> None:
        async def status(key: str | None, **body: Any) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return (await http.post("/sessions", json=body, headers=headers)).status_code

        assert await status("wrong") == 401
        assert await status(OWNER, task="no-such-task") == 404
        assert await status(OWNER, messages=[{"role": "user", "content": "mine"}]) == 404
        assert await status(OWNER, group="g999999") == 429
        opened = await lease(http, training)
        assert opened is not None
        assert "answer" not in opened["prompt"]
        own = opened["session_key"]
        assert await status(own) == 403, "an agent's key opens no sessions"
        body = {"rewards": {"reward": 1.0}}
        reply = await http.post(
            f"/sessions/{opened['episode_id']}/reward", json=body, headers={"Authorization": f"Bearer {own}"}
        )
        assert reply.status_code == 403, "an agent cannot reward itself"
        await talk(http, opened)
        await http.post(f"/sessions/{opened['episode_id']}/finish", json={"rewards": {"reward": 1, "style": 1}})
        await work(http, training)

    run_with(changed(external, steps=1), asks)


def test_it_cannot_be_evaluated(tmp_path: Path, tool_model: Path) -> None:
    with pytest.raises(ValidationError, match="agents elsewhere cannot be asked for the held-out prompts"):
        config(tmp_path, tool_model, {"type": "external"}, data={"eval_prompts": 2})


def test_given_rewards_need_somebody_who_gives(tmp_path: Path, tool_model: Path) -> None:
    given = [{"type": "given"}]
    for runner in ({"type": "single"}, {"type": "command", "command": ["agent"]}):
        with pytest.raises(ValidationError, match="nobody gives a reward"):
            config(tmp_path, tool_model, runner, rewards=given)
    with pytest.raises(ValidationError, match="measures what no reward reads"):
        config(tmp_path, tool_model, {"type": "command", "command": ["agent"], "verify": ["check"]})
