"""The owner's routes: open, look at, reward, fork and finish sessions; and what is open to all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

from sluice.gym import KEY as GYM
from sluice.rollout.gateway.access import require_any, require_owner
from sluice.rollout.gateway.body import Body, read
from sluice.rollout.gateway.book import Ended, Entry
from sluice.rollout.gateway.desk import Wanted
from sluice.rollout.gateway.documents import READING, WRITING, answers, reads
from sluice.rollout.gateway.metrics import metrics_text
from sluice.rollout.gateway.page import PAGE, POLICY
from sluice.types import Message, Outcome

if TYPE_CHECKING:
    from sluice.rollout.gateway.server import Gateway

Id = Annotated[str, Path(description="episode id")]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Score = Annotated[float, Field(ge=-1e12, le=1e12)]


class OpeningMessage(Body):
    """A message of a prompt that the caller brings."""

    role: Literal["system", "user", "assistant"]
    content: str


class OpenRequest(Body):
    """Body of `POST /sessions`."""

    task: Annotated[str, Field(max_length=256)] = ""
    group: Annotated[str, Field(max_length=256)] = ""
    messages: Annotated[list[OpeningMessage], Field(min_length=1)] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class RewardRequest(Body):
    """Body of `POST /sessions/{id}/reward`: components by name; a later value replaces an earlier one."""

    rewards: Annotated[dict[Name, Score], Field(min_length=1, max_length=256)]


class FinishRequest(Body):
    """Body of `POST /sessions/{id}/finish`. Without an outcome it follows from the last call."""

    outcome: Outcome | None = None
    reason: Annotated[str, Field(max_length=1000)] = ""
    rewards: Annotated[dict[Name, Score], Field(max_length=256)] = Field(default_factory=dict[str, float])


class ForkRequest(Body):
    """Body of `POST /sessions/{id}/fork`."""

    reason: Annotated[str, Field(min_length=1, max_length=200)]


BODIES = (OpenRequest, RewardRequest, FinishRequest, ForkRequest)
"""Bodies that these routes read."""


def session_routes(gateway: Gateway) -> APIRouter:
    """The routes; see the module."""
    routes = APIRouter(tags=["sessions"])
    _looking(gateway, routes)
    _writing(gateway, routes)
    _open_to_all(gateway, routes)
    return routes


def _writing(gateway: Gateway, routes: APIRouter) -> None:
    @routes.post(
        "/sessions", status_code=201, openapi_extra=reads(OpenRequest),
        responses=answers(["episode_id", "session_key"], (*WRITING, 409, 429, 503), status=201),
    )  # fmt: skip
    async def open_session(request: Request) -> JSONResponse:
        """Lease a prompt and open its session. The key is shown here and nowhere else."""
        require_owner(gateway, request)
        body = await read(request, OpenRequest)
        brought = tuple(Message(one.role, one.content) for one in body.messages) if body.messages else None
        session, key = await gateway.lease(Wanted(body.task, body.group, brought, body.metadata))
        prompt = session.prompt
        shown = {
            "episode_id": session.id,
            "group_id": session.group_id,
            "session_key": key,
            "openai_base_url": f"{gateway.url}/v1",
            "anthropic_base_url": gateway.url,
            "idle_seconds": gateway.config.idle_seconds,
            "prompt": {
                "id": prompt.id,
                "task": prompt.task,
                "messages": [message._asdict() for message in prompt.messages],
                "metadata": _jsonable({name: value for name, value in prompt.metadata.items() if name != GYM}),
            },
        }
        return JSONResponse(shown, 201, {"cache-control": "no-store"})

    @routes.post(
        "/sessions/{id:path}/reward",
        openapi_extra=reads(RewardRequest),
        responses=answers(["episode_id", "rewards"], WRITING),
    )
    async def reward(id: Id, request: Request) -> JSONResponse:
        """Give reward components to an open session."""
        require_owner(gateway, request)
        body = await read(request, RewardRequest)
        entry = gateway.book.by_id(id)
        entry.rewards |= body.rewards
        return JSONResponse({"episode_id": id, "rewards": entry.rewards})

    @routes.post(
        "/sessions/{id:path}/finish",
        openapi_extra=reads(FinishRequest),
        responses=answers(["episode_id", "outcome"], (*WRITING, 503)),
    )
    async def finish(id: Id, request: Request) -> JSONResponse:
        """End a session: its episode goes to training, its key is good for nothing any more."""
        require_owner(gateway, request)
        body = await read(request, FinishRequest)
        entry = gateway.book.by_id(id)
        entry.rewards |= body.rewards
        episode = await gateway.finish(id, body.outcome, body.reason)
        told = {"episode_id": id, "outcome": episode.outcome.value, "reason": episode.reason}
        counted = {"segments": len(episode.segments), "sampled_tokens": episode.num_sampled_tokens}
        return JSONResponse({**told, **counted, "rewards": entry.rewards})

    @routes.post(
        "/sessions/{id:path}/fork",
        openapi_extra=reads(ForkRequest),
        responses=answers(["episode_id", "reason"], WRITING),
    )
    async def fork(id: Id, request: Request) -> JSONResponse:
        """Say that the next history which does not go on is meant so: compaction, a sub-agent, an edit."""
        require_owner(gateway, request)
        body = await read(request, ForkRequest)
        gateway.book.by_id(id).session.declare_fork(body.reason)
        return JSONResponse({"episode_id": id, "reason": body.reason})


def _looking(gateway: Gateway, routes: APIRouter) -> None:
    @routes.get("/sessions", responses=answers(["sessions"], READING))
    async def sessions(request: Request) -> JSONResponse:
        """Open sessions, then those that ended, the latest first."""
        require_owner(gateway, request)
        listed = [_summary(entry) for entry in gateway.book]
        return JSONResponse({"sessions": listed + [_ended(one) for one in gateway.book.ended()]})

    @routes.get("/sessions/{id:path}", responses=answers(["episode_id", "segments"], (*READING, 404)))
    async def session(id: Id, request: Request) -> JSONResponse:
        """One open session with its turns, and what was odd about it."""
        require_owner(gateway, request)
        entry = gateway.book.by_id(id)
        told = {"segments": entry.session.transcript(), "warnings": _warnings(entry)}
        return JSONResponse({**_summary(entry), **told})


def _open_to_all(gateway: Gateway, routes: APIRouter) -> None:
    @routes.get("/health", responses=answers(["status"], ()))
    async def health() -> JSONResponse:
        """Whether requests are answered."""
        return JSONResponse({"status": "ok", "open_sessions": len(gateway.book)})

    @routes.get("/metrics", response_class=PlainTextResponse, responses=_errors_only(READING[:1]))
    async def metrics(request: Request) -> PlainTextResponse:
        """Counters in Prometheus' text form. No key, no id."""
        require_any(gateway, request)
        return PlainTextResponse(metrics_text(gateway), media_type="text/plain; version=0.0.4")

    @routes.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The session browser. It asks for the owner's key."""
        return HTMLResponse(PAGE, headers={"content-security-policy": POLICY, "cache-control": "no-store"})


def _errors_only(errors: tuple[int, ...]) -> dict[int | str, dict[str, Any]]:
    return {status: one for status, one in answers([], errors).items() if status != 200}


def _summary(entry: Entry) -> dict[str, Any]:
    session = entry.session
    return {
        "episode_id": session.id,
        "group_id": session.group_id,
        "task": session.prompt.task,
        "state": "open",
        "outcome": None,
        "reason": "",
        "opened": entry.opened,
        "in_flight": session.in_flight,
        "counters": session.counters(),
        "rewards": dict(entry.rewards),
    }


def _ended(one: Ended) -> dict[str, Any]:
    return {
        "episode_id": one.id,
        "group_id": one.group_id,
        "task": one.task,
        "state": "ended",
        "outcome": one.outcome,
        "reason": one.reason,
        "opened": one.opened,
        "ended": one.ended,
        "in_flight": 0,
        "counters": one.counters,
    }


def _warnings(entry: Entry) -> list[str]:
    counters = entry.session.counters()
    said = {
        "mismatches": "histories came back that are not the recorded ones",
        "sampling_flagged": "calls asked for other sampling parameters",
        "malformed_calls": "texts began like a tool call and were none",
    }
    return [f"{counters[name]} {words}" for name, words in said.items() if counters.get(name)]


def _jsonable(value: Any) -> Any:
    """Metadata as JSON: what has no JSON form becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    finite = isinstance(value, float) and value == value and abs(value) != float("inf")
    return value if value is None or finite or isinstance(value, bool | int | str) else str(value)
