"""The routes that agents call: model calls of one session."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sluice.rollout.gateway import anthropic, openai_chat, openai_responses
from sluice.rollout.gateway.access import require_any, session_of
from sluice.rollout.gateway.body import read
from sluice.rollout.gateway.book import Entry, Link
from sluice.rollout.gateway.completions import Completing, CompletionRequest
from sluice.rollout.gateway.documents import CALLING, answers, reads
from sluice.rollout.gateway.errors import BadRequest
from sluice.rollout.gateway.messaging import Messaging
from sluice.rollout.gateway.responding import Responding
from sluice.rollout.gateway.stream import Call, Choices, EventStream, Stream, failed_event, whole
from sluice.rollout.session import Ask

if TYPE_CHECKING:
    from sluice.rollout.gateway.server import Gateway

MODELS = (
    openai_chat.ChatRequest,
    CompletionRequest,
    openai_responses.ResponsesRequest,
    anthropic.MessagesRequest,
    anthropic.CountRequest,
)
"""Bodies that these routes read."""


def new_id(prefix: str) -> str:
    """The id of an answer."""
    return prefix + secrets.token_hex(12)


def model_routes(gateway: Gateway) -> APIRouter:
    """The routes; see the module."""
    routes = APIRouter(tags=["model"])
    _chat(gateway, routes)
    _completions(gateway, routes)
    _responses(gateway, routes)
    _messages(gateway, routes)

    @routes.get("/v1/models", responses=answers(["object", "data"], (401,)))
    async def models(request: Request) -> JSONResponse:
        """The policy. Any name is taken in a request's `model` and given back: a session has one policy."""
        require_any(gateway, request)
        one = {"id": gateway.policy, "object": "model", "created": int(gateway.started), "owned_by": "sluice"}
        return JSONResponse({"object": "list", "data": [one]})

    return routes


def _caller(entry: Entry, ask: Ask) -> Call:
    return lambda tell: entry.session.ask(replace(ask, on_delta=tell))


async def _serve(
    gateway: Gateway,
    request: Request,
    entry: Entry,
    call: Call,
    *,
    streamed: bool | None,
    full: Callable[[Choices], dict[str, Any]],
    events: Callable[[Stream], AsyncIterator[bytes]],
) -> Response:
    """Answer a call as one JSON object, or as events."""
    try:
        if not streamed:
            return JSONResponse(full(await whole(request, call)))
        stream = await Stream.open(request, call)
        return EventStream(stream, events(stream), failed_event(request.url.path), request)
    finally:
        gateway.alarm(entry)


def _chat(gateway: Gateway, routes: APIRouter) -> None:
    @routes.post(
        "/v1/chat/completions",
        openapi_extra=reads(openai_chat.ChatRequest),
        responses=answers(["id", "object", "choices"], CALLING, stream=True),
    )
    async def chat(request: Request) -> Response:
        """OpenAI's chat completions."""
        entry = session_of(gateway, request)
        body = await read(request, openai_chat.ChatRequest)
        call = _caller(entry, openai_chat.ask(body))
        answering = openai_chat.Answering(new_id("chatcmpl-"), body.model or gateway.policy, body, gateway.chat)
        return await _serve(
            gateway, request, entry, call,
            streamed=body.stream, full=answering.completion, events=answering.events,
        )  # fmt: skip


def _completions(gateway: Gateway, routes: APIRouter) -> None:
    @routes.post(
        "/v1/completions",
        openapi_extra=reads(CompletionRequest),
        responses=answers(["id", "object", "choices"], CALLING, stream=True),
    )
    async def completions(request: Request) -> Response:
        """OpenAI's plain completions: text or ids, continued."""
        entry = session_of(gateway, request)
        body = await read(request, CompletionRequest)
        prompt = body.text_or_ids()
        vocabulary = gateway.chat.vocabulary_size
        if not isinstance(prompt, str) and max(prompt) >= vocabulary:
            raise BadRequest(f"the prompt has ids beyond the vocabulary of {vocabulary}", param="prompt")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())

        def call(tell: Any) -> Any:
            return entry.session.complete(
                prompt,
                n=body.n or 1,
                max_new_tokens=body.max_tokens,
                stop=tuple(text for text in stop if text),
                wishes=body.wishes(),
                on_delta=tell,
            )

        completing = Completing(new_id("cmpl-"), body.model or gateway.policy, body, gateway.chat)
        return await _serve(
            gateway, request, entry, call,
            streamed=body.stream, full=completing.completion, events=completing.events,
        )  # fmt: skip


def _responses(gateway: Gateway, routes: APIRouter) -> None:
    @routes.post(
        "/v1/responses",
        openapi_extra=reads(openai_responses.ResponsesRequest),
        responses=answers(["id", "object", "output"], CALLING, stream=True),
    )
    async def responses(request: Request) -> Response:
        """OpenAI's responses. `previous_response_id` names an earlier answer of the same session."""
        entry = session_of(gateway, request)
        body = await read(request, openai_responses.ResponsesRequest)
        previous = None
        if body.previous_response_id:
            previous = entry.responses.get(body.previous_response_id)
            if previous is None:
                raise BadRequest("this session has no such response", param="previous_response_id")
        ask = openai_responses.ask(body, previous.history() if previous else ())
        sent = openai_responses.messages(body)
        responding = Responding(new_id("resp_"), body.model or gateway.policy, body, gateway.chat)

        def keep(choices: Choices) -> None:
            answer = openai_responses.answered(choices[0])
            entry.responses[responding.id] = Link(previous, (*sent, answer))

        def full(choices: Choices) -> dict[str, Any]:
            keep(choices)
            return responding.whole(choices)

        async def events(stream: Stream) -> AsyncIterator[bytes]:
            async for part in responding.events(stream):
                if responding.choice is not None and responding.id not in entry.responses:
                    keep(stream.choices())
                yield part

        return await _serve(
            gateway, request, entry, _caller(entry, ask),
            streamed=body.stream, full=full, events=events,
        )  # fmt: skip


def _messages(gateway: Gateway, routes: APIRouter) -> None:
    @routes.post(
        "/v1/messages",
        openapi_extra=reads(anthropic.MessagesRequest),
        responses=answers(["id", "type", "content"], CALLING, stream=True),
    )
    async def messages(request: Request) -> Response:
        """Anthropic's messages."""
        entry = session_of(gateway, request)
        body = await read(request, anthropic.MessagesRequest)
        call = _caller(entry, anthropic.ask(body))
        messaging = Messaging(new_id("msg_"), body.model or gateway.policy, body, gateway.chat)
        return await _serve(
            gateway, request, entry, call,
            streamed=body.stream, full=messaging.whole, events=messaging.events,
        )  # fmt: skip

    @routes.post(
        "/v1/messages/count_tokens",
        openapi_extra=reads(anthropic.CountRequest),
        responses=answers(["input_tokens"], CALLING),
    )
    async def count_tokens(request: Request) -> JSONResponse:
        """The tokens before the answer if these messages were sent now. Nothing is sampled or recorded."""
        entry = session_of(gateway, request)
        body = await read(request, anthropic.CountRequest)
        count = entry.session.count_tokens(
            anthropic.messages(body), anthropic.tools(body), anthropic.template_kwargs(body)
        )
        return JSONResponse({"input_tokens": count})
