"""Request bodies: bounded in bytes, time and depth, and plain JSON objects."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sluice.rollout.gateway.errors import BadRequest
from sluice.rollout.gateway.problems import shaped

_READ_SECONDS = 60.0
"""A client that has not sent its whole body by then is answered 408."""
_DEPTH = 64
"""Levels of nesting in a body."""
_SHOWN = 3
"""Faults of a body that are named."""


class Body(BaseModel):
    """A JSON object of an API. Fields that it does not name are let through: clients send extras."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


class BodyLimit:
    """Reads each body, at most `most` bytes of it, before the application sees the request.

    Content-Length is believed only where it says too much: a chunked body is counted as it comes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = (413, "request_too_large", f"the body is larger than {self._most} bytes")
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._most:
            await _refuse(scope, receive, send, *too_large)
            return
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(_READ_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._most:
                        await _refuse(scope, receive, send, *too_large)
                        return
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            late = f"the body did not arrive within {_READ_SECONDS:g} s"
            await _refuse(scope, receive, send, 408, "request_timeout", late)
            return
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, code: str, message: str) -> None:
    await JSONResponse(shaped(scope["path"], status, code, message), status)(scope, receive, send)


async def read(request: Request, model: type[Model]) -> Model:
    """The body as `model`.

    Raises:
        BadRequest: no JSON, no object, nested too deep, text that is no Unicode, or fields of another kind.
    """
    value = parse(await request.body())
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        first = ".".join(str(part) for part in faults[0]["loc"]) or None
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in faults[:_SHOWN])
        raise BadRequest(f"the body cannot be used: {said}", param=first) from None


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object from bytes; see `read`."""
    if not raw.strip():
        raise BadRequest("the body is empty", hint="send a JSON object")
    try:
        value: Any = json.loads(raw.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise BadRequest(f"the body is nested deeper than {_DEPTH} levels") from None
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body is a JSON {type(value).__name__}, not an object")
    _check(value)
    return cast("dict[str, Any]", value)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check(value: Any) -> None:
    """Depth, and text that can be encoded: a lone surrogate escape is valid JSON and no text."""
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                _check_text(one)
            elif isinstance(one, dict):
                for key, inner in cast("dict[str, Any]", one).items():
                    _check_text(key)
                    below.append(inner)
            elif isinstance(one, list):
                below += cast("list[Any]", one)
            elif isinstance(one, float) and (one != one or abs(one) == float("inf")):
                raise BadRequest("a number in the body is too large")
        if not below:
            return
        level = below
    raise BadRequest(f"the body is nested deeper than {_DEPTH} levels")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("a text in the body holds half of a surrogate pair, which is no character") from None
