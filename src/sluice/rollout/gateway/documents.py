"""The OpenAPI document: bodies as they are read, and every status that a route can answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"
_WHY: Mapping[int, str] = {
    400: "The request cannot be served as it is",
    401: "No key, or an unknown one",
    403: "A key that is not good for this",
    404: "Not there",
    408: "The body did not arrive in time",
    409: "Conflict with what was recorded",
    410: "The session has ended",
    413: "The body is too large",
    429: "Come back later",
    500: "The gateway failed",
    503: "The engine is not there",
}
READING = (401, 403)
WRITING = (400, 401, 403, 404, 408, 413)
CALLING = (400, 401, 403, 404, 408, 409, 410, 413, 429, 503)


def reads(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers(
    required: Iterable[str], errors: Iterable[int], *, status: int = 200, stream: bool = False
) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route whose answer is an object with the fields `required`."""
    schema = {"type": "object", "required": list(required)}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    found: dict[int | str, dict[str, Any]] = {status: {"description": "Done", "content": content}}
    refusal = {"application/json": {"schema": {"$ref": _REF.format(model="Problem")}}}
    for error in errors:
        found[error] = {"description": _WHY[error], "content": refusal}
        if error in (429, 503):
            found[error]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    return found


def document(app: FastAPI, models: Iterable[type[BaseModel]]) -> dict[str, Any]:
    """The whole document."""
    made = get_openapi(
        title="Sluice gateway",
        version="1",
        description="Sessions of recorded tokens behind OpenAI's and Anthropic's routes.",
        routes=app.routes,
    )
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas |= definitions["$defs"]
    schemas["Problem"] = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, methods in made["paths"].items():
        for operation in methods.values():
            operation["security"] = [] if path in ("/", "/health") else [{"bearer": []}, {"x-api-key": []}]
    return made
