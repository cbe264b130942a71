"""What a server can do, read off its own description of its routes and off one generated token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sluice.errors import CapabilityError
from sluice.rollout.engines.base import Capabilities, PauseMode
from sluice.rollout.engines.sglang.wire import RefusedError, Wire
from sluice.types import SamplingParams

ROUTES = (
    "/generate", "/abort_request", "/pause_generation", "/continue_generation", "/flush_cache", "/server_info",
    "/model_info", "/update_weights_from_disk", "/update_weights_from_tensor",
)  # fmt: skip
"""What the client cannot do without."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server's abilities beyond `Capabilities`.

    Attributes:
        capabilities: what the engine as a whole can do, with what the client adds.
        bracketed: updates stand between /begin_weight_update and /end_weight_update (0.5.21 and later).
        retracts: a recompute pause is the server's own; else it is an abort, and requests are sent again.
            Before 0.5.21 the flush that must follow ends the process while retracted requests wait.
        salted: requests can name a prefix-cache namespace.
        tp_size: tensor-parallel ranks; each reads its own copy of a serialised bucket.
        mask_tokens: largest top_k whose sampled-from distribution is reported; 0 when none is.
    """

    capabilities: Capabilities
    bracketed: bool
    retracts: bool
    salted: bool
    tp_size: int
    mask_tokens: int

    def reports_kept(self, sampling: SamplingParams) -> bool:
        """Whether it tells the log-probs after top-p/top-k/min-p: only for a bounded number of tokens."""
        return self.mask_tokens > 0 and (sampling.temperature == 0 or 1 <= sampling.top_k <= self.mask_tokens)


async def shake_hands(wire: Wire, name: str) -> Server:
    """Ask; ends a pause that somebody left behind.

    Raises:
        EngineError: nobody answers.
        CapabilityError: a route, or log-probs, are missing.
    """
    spec = await _spec(wire)
    info = await wire.get("/server_info")
    await wire.post("/continue_generation")
    spans = await _probe(wire)
    pauses = _fields(spec, "/pause_generation").get("mode", {}).get("enum", [])
    asks = _fields(spec, "/generate")
    bracketed = "/begin_weight_update" in spec["paths"]
    modes = {PauseMode.RECOMPUTE, PauseMode.ABORT}
    if spans and "in_place" in pauses and "extra_key" in asks:
        modes.add(PauseMode.KEEP_KV)
    return Server(
        Capabilities(
            name=name,
            engine_version=f"sglang {info.get('version', 'of unknown version')}",
            context_length=int(info.get("context_length") or info["max_req_input_len"]),
            version_spans=spans,
            bracketed_updates=bracketed,
            pause_modes=frozenset(modes),
        ),
        bracketed=bracketed,
        retracts=bracketed and spans and "retract" in pauses,
        salted="extra_key" in asks,
        tp_size=int(info.get("tp_size", 1)),
        mask_tokens=int(info.get("sampling_mask_max_tokens", 4096)) if "return_sampling_mask" in asks else 0,
    )


async def _spec(wire: Wire) -> dict[str, Any]:
    """The server's OpenAPI description, with all routes that are needed."""
    try:
        spec = await wire.get("/openapi.json")
    except RefusedError as error:
        raise CapabilityError(
            f"{wire.where} does not describe its routes: {error}",
            hint="start SGLang without DISABLE_OPENAPI_DOC, and give the URL of the server, not of a router",
        ) from error
    missing = [route for route in ROUTES if route not in spec.get("paths", {})]
    if missing:
        raise CapabilityError(
            f"{wire.where} lacks {', '.join(missing)}",
            hint="it must be a recent SGLang server; 0.5.21 is the version Sluice is tested with",
        )
    return spec


async def _probe(wire: Wire) -> bool:
    """Generate one token. Returns whether the reply has version spans; CapabilityError without log-probs."""
    sampling = {"max_new_tokens": 1, "ignore_eos": True}
    reply = await wire.post("/generate", {"input_ids": [0], "sampling_params": sampling, "return_logprob": True})
    meta = reply.get("meta_info", {})
    if not meta.get("output_token_logprobs"):
        raise CapabilityError(
            f"{wire.where} returns no log-probs of sampled tokens",
            hint="behaviour log-probs must come from the engine: use a newer SGLang",
        )
    return "weight_versions" in meta


def _fields(spec: Mapping[str, Any], route: str) -> dict[str, Any]:
    """The properties of a route's JSON body in an OpenAPI description; empty when it takes none."""
    post = spec["paths"][route].get("post", {})
    schema = post.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in schema:
        schema = spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema.get("properties", {})
