"""The application: routes, errors, and what stands around every request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sluice.errors import SluiceError
from sluice.rollout.gateway.body import BodyLimit
from sluice.rollout.gateway.documents import document
from sluice.rollout.gateway.model_routes import MODELS, model_routes
from sluice.rollout.gateway.problems import answer, shaped
from sluice.rollout.gateway.session_routes import BODIES, session_routes
from sluice.rollout.gateway.stream import ClientGone

if TYPE_CHECKING:
    from sluice.rollout.gateway.server import Gateway

_CLIENT_GONE = 499
_APIS = (
    ("/v1/chat", "chat"), ("/v1/completions", "completions"), ("/v1/responses", "responses"),
    ("/v1/messages", "messages"), ("/v1", "v1"), ("/sessions", "sessions"),
)  # fmt: skip


def create_app(gateway: Gateway) -> FastAPI:
    """The application over one gateway."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(model_routes(gateway))
    app.include_router(session_routes(gateway))
    made = document(app, (*MODELS, *BODIES))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(made)

    app.openapi = lambda: made  # pyright: ignore[reportAttributeAccessIssue]
    _handle_errors(app)
    app.add_middleware(BodyLimit, most=gateway.config.body_bytes)
    app.add_middleware(_Counting, gateway=gateway)
    return app


def _handle_errors(app: FastAPI) -> None:
    async def told(request: Request, error: Exception) -> Response:
        return answer(request, error)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        codes = {404: "not_found", 405: "method_not_allowed"}
        body = shaped(request.url.path, error.status_code, codes.get(error.status_code, "http_error"), error.detail)
        return JSONResponse(body, error.status_code, dict(error.headers or {}))

    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        SluiceError: told,
        ClientGone: gone,
        HTTPException: http,
        Exception: told,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


class _Counting:
    """Counts answers by API and status."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        api = next((name for prefix, name in _APIS if path.startswith(prefix)), "other")

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._gateway.responses[api, message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counted)
