"""What a server can do, read off its own description of its routes and off one generated token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sluice.errors import CapabilityError, EngineError
from sluice.rollout.engines.base import Capabilities, GenerateRequest, PauseMode
from sluice.rollout.engines.sglang.messages import RouteShape
from sluice.rollout.engines.sglang.wire import RefusedError, Wire
from sluice.types import SamplingParams

ROUTES = (
    "/generate", "/abort_request", "/pause_generation", "/continue_generation", "/flush_cache", "/server_info",
    "/model_info", "/update_weights_from_disk", "/update_weights_from_tensor",
)  # fmt: skip
"""What the client cannot do without."""
NOBODY = "2.2.2.2"
"""SGLang's own name of a partner that a prefill or decode server need not wait for."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server's abilities beyond `Capabilities`.

    Attributes:
        capabilities: what the engine as a whole can do, with what the client adds.
        bracketed: updates stand between /begin_weight_update and /end_weight_update (0.5.21 and later).
        retracts: a recompute pause is the server's own; else it is an abort, and requests are sent again.
            Before 0.5.21 the flush that must follow ends the process while retracted requests wait, and a
            decode server (0.5.21) counts tokens from before the pause as drawn by the weights after it.
        salted: requests can name a prefix-cache namespace.
        tp_size: tensor-parallel ranks; each reads its own copy of a serialised bucket.
        mask_tokens: largest top_k whose sampled-from distribution is reported; 0 when none is.
        checks: it can tell a checksum of its weights.
        routes: what a position's routed experts are made of; None when they are not reported.
        keyed: draws follow a request's noise key, and any distribution is reported: an embedded engine's server.
        graphs: memory of captured graphs is a part of its own, under this tag.
    """

    capabilities: Capabilities
    bracketed: bool
    retracts: bool
    salted: bool
    tp_size: int
    mask_tokens: int
    checks: bool = False
    routes: RouteShape | None = None
    keyed: bool = False
    graphs: tuple[str, ...] = ()

    def reports_kept(self, sampling: SamplingParams) -> bool:
        """Whether it tells the log-probs after top-p/top-k/min-p: SGLang only for a bounded number of tokens."""
        bounded = sampling.temperature == 0 or 1 <= sampling.top_k <= self.mask_tokens
        return self.keyed or (self.mask_tokens > 0 and bounded)


async def shake_hands(wire: Wire, name: str, model: Path | None = None) -> Server:
    """Ask; ends a pause that somebody left behind.

    Args:
        wire: to the server.
        name: of the engine.
        model: folder of the model it serves; None takes what the server says, if that is a folder here.

    Raises:
        EngineError: nobody answers.
        CapabilityError: a route, or log-probs, are missing.
    """
    spec = await _spec(wire)
    info = await wire.get("/server_info")
    alone = info.get("disaggregation_mode") in (None, "", "null")
    await wire.post("/continue_generation")
    spans = await _probe(wire, alone=alone)
    pauses = _fields(spec, "/pause_generation").get("mode", {}).get("enum", [])
    asks = _fields(spec, "/generate")
    keyed = "noise_key" in asks
    bracketed = "/begin_weight_update" in spec["paths"]
    modes = {PauseMode.RECOMPUTE, PauseMode.ABORT}
    if "in_place" in pauses:
        modes.add(PauseMode.KEEP_KV)
    routes = None
    if info.get("enable_return_routed_experts"):
        told = str(info.get("model_path", ""))
        routes = route_shape(model or Path(told), name)
    return Server(
        Capabilities(
            name=name,
            engine_version=f"{'sluice' if keyed else 'sglang'} {info.get('version', 'of unknown version')}",
            context_length=int(info.get("context_length") or info["max_req_input_len"]),
            version_spans=spans,
            keyed_noise=keyed,
            bracketed_updates=bracketed,
            pause_modes=frozenset(modes),
            routed_experts=routes is not None,
            memory_release="/release_memory_occupation" in spec["paths"]
            and (bool(info.get("enable_memory_saver")) or info.get("device") == "cpu"),
        ),
        bracketed=bracketed,
        retracts=bracketed and spans and "retract" in pauses and alone,
        salted="extra_key" in asks,
        tp_size=int(info.get("tp_size", 1)),
        mask_tokens=int(info.get("sampling_mask_max_tokens", 4096)) if "return_sampling_mask" in asks else 0,
        checks="/weights_checker" in spec["paths"],
        routes=routes,
        keyed=keyed,
        graphs=() if keyed else ("cuda_graph",),
    )


def common(servers: Sequence[Server], name: str) -> Server:
    """What every one of several servers can do."""
    found = [server.capabilities for server in servers]
    return Server(
        replace(
            found[0],
            name=name,
            engine_version=", ".join(sorted({each.engine_version for each in found})),
            context_length=min(each.context_length for each in found),
            version_spans=all(each.version_spans for each in found),
            keyed_noise=all(each.keyed_noise for each in found),
            bracketed_updates=all(each.bracketed_updates for each in found),
            pause_modes=frozenset.intersection(*(each.pause_modes for each in found)),
            routed_experts=all(each.routed_experts for each in found),
            memory_release=all(each.memory_release for each in found),
        ),
        bracketed=all(server.bracketed for server in servers),
        retracts=all(server.retracts for server in servers),
        salted=all(server.salted for server in servers),
        tp_size=max(server.tp_size for server in servers),
        mask_tokens=min(server.mask_tokens for server in servers),
        checks=all(server.checks for server in servers),
        routes=servers[0].routes if all(server.routes == servers[0].routes for server in servers) else None,
        keyed=all(server.keyed for server in servers),
        graphs=servers[0].graphs,
    )


def route_shape(model: Path, name: str) -> RouteShape:
    """Layers and experts per token of the model in a folder.

    Raises:
        CapabilityError: the folder does not say; without it the experts a server sends cannot be told apart.
    """
    try:
        config: dict[str, Any] = json.loads((model / "config.json").read_text())
        config = config.get("text_config", config)
        return RouteShape(int(config["num_hidden_layers"]), int(config["num_experts_per_tok"]))
    except (OSError, ValueError, KeyError) as error:
        raise CapabilityError(
            f"{name} reports routed experts, but {model}/config.json does not tell layers and experts per token",
            hint="serve the model from a folder that is readable here, or without --enable-return-routed-experts",
        ) from error


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


async def _probe(wire: Wire, *, alone: bool) -> bool:
    """Generate one token. Returns whether the reply has version spans; CapabilityError without log-probs."""
    sampling = {"max_new_tokens": 1, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": [0], "sampling_params": sampling, "return_logprob": True}
    if not alone:
        body |= {"bootstrap_host": NOBODY, "bootstrap_room": 0}
    meta = (await wire.post("/generate", body)).get("meta_info", {})
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


def admit(request: GenerateRequest, server: Server, vocab_size: int | None) -> int:
    """Refuse what can never be served, or would end the server. Returns how many tokens may be drawn.

    Raises:
        EngineError: the context is empty, too long, or has ids outside the vocabulary.
        CapabilityError: the distribution that is sampled from, or the experts, could not be reported.
    """
    rid, ids, sampling = request.rid, request.ids, request.sampling
    name, context_length = server.capabilities.name, server.capabilities.context_length
    if ids.ndim != 1 or not len(ids):
        raise EngineError(f"request {rid!r} has a context of shape {list(ids.shape)}, not [n ≥ 1]")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise EngineError(
            f"request {rid!r} has token ids from {low} to {high}; the vocabulary has {vocab_size}",
            hint="prompts must be made with the tokenizer of the model that is served",
        )
    if len(ids) >= context_length:
        raise EngineError(
            f"request {rid!r} has {len(ids)} context tokens; {name} holds {context_length}, and at "
            "least one token must be drawn",
            hint="shorten the prompt or start SGLang with a larger --context-length",
        )
    if not sampling.is_plain and not server.reports_kept(sampling):
        raise CapabilityError(
            f"{name} cannot report the distribution it samples from with {sampling}",
            hint=f"with top_p or min_p also set top_k, from 1 to {server.mask_tokens}, or sample plainly",
        )
    if request.routes_from is not None and not server.capabilities.routed_experts:
        raise CapabilityError(
            f"{name} does not report routed experts, which request {rid!r} asks for",
            hint="start it with rollout.sglang.routed_experts = true, or --enable-return-routed-experts",
        )
    return min(sampling.max_new_tokens, context_length - len(ids))
