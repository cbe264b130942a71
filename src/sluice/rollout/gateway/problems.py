"""Errors as each API's clients expect them. None carries a traceback or a key."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from sluice.errors import DataError, EngineError, SluiceError
from sluice.rollout.gateway.errors import BadRequest, SessionError

_LOG = logging.getLogger(__name__)
_ENGINE_RETRY_SECONDS = 2
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def described(error: Exception) -> tuple[int, str, str, str | None, int | None]:
    """Status, code, message, field at fault and seconds to wait."""
    match error:
        case SessionError():
            param = error.param if isinstance(error, BadRequest) else None
            return error.status, error.code, _plain(error), param, error.retry_after
        case DataError():
            return 400, "invalid_request_error", _plain(error), "messages", None
        case EngineError():
            message = f"the engine did not answer: {_plain(error)}"
            return 503, "engine_unavailable", message, None, _ENGINE_RETRY_SECONDS
        case _:
            return 500, "internal_error", "the gateway failed; its log says why", None, None


def _plain(error: SluiceError) -> str:
    """Message and next move in one line."""
    message = str(error.args[0]) if error.args else ""
    return f"{message}; {error.hint}" if error.hint else message


def shaped(path: str, status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error on this path."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message, "code": code}}
    kind = "server_error" if status >= 500 else _OPENAI_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


def answer(request: Request, error: Exception) -> JSONResponse:
    """The HTTP answer for an error."""
    status, code, message, param, wait = described(error)
    if status >= 500 and not isinstance(error, SluiceError):
        _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    headers = {} if wait is None else {"retry-after": str(wait)}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(shaped(request.url.path, status, code, message, param), status, headers)


def in_stream(path: str, error: Exception) -> Mapping[str, Any]:
    """The error as an event of a stream that has begun."""
    status, code, message, param, _ = described(error)
    if status >= 500 and not isinstance(error, SluiceError):
        _LOG.error("a stream of %s failed", path, exc_info=error)
    return shaped(path, status, code, message, param)
