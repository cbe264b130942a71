"""A server that answers as SGLang does, at once and always the same: what is left is the cost of what stands before it.

    python -m benchmarks.trivial_worker PORT TOKEN_ID ...

Serves the routes that Sluice's handshake and the router ask for. Nothing is sampled: every answer is the given ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from aiohttp import web

from sluice.rollout.engines.sglang.handshake import ROUTES

MODEL = "trivial"


class Worker:
    """Its only state is the label of its weights."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self.label = "default"

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 1024**2)
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/openapi.json", self.routes)
        app.router.add_route("*", "/{path:.*}", self.other)
        return app

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        meta = {
            "id": body.get("rid", ""),
            "finish_reason": {"type": "stop", "matched": self.ids[-1]},
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(self.ids),
            "cached_tokens": 0,
            "weight_version": self.label,
            "weight_versions": [{"version": self.label, "start": 0, "end": len(self.ids)}],
            "output_token_logprobs": [[-0.5, token, None] for token in self.ids],
        }
        answer = {"text": "", "output_ids": self.ids, "meta_info": meta}
        if not body.get("stream"):
            return web.json_response(answer)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: " + json.dumps(answer).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def routes(self, _request: web.Request) -> web.Response:
        fields = {"extra_key": {}, "mode": {"enum": ["abort", "in_place", "retract"]}}
        post = {"requestBody": {"content": {"application/json": {"schema": {"properties": fields}}}}}
        return web.json_response({"paths": {route: {"post": post} for route in (*ROUTES, "/begin_weight_update")}})

    async def other(self, request: web.Request) -> web.Response:
        text = await request.text()
        body = json.loads(text) if text else {}
        self.label = body.get("weight_version") or self.label
        facts = {"model_path": MODEL, "served_model_name": MODEL, "is_generation": True, "weight_version": self.label}
        facts |= {"context_length": 32_768, "version": "0.5.21", "tp_size": 1, "dp_size": 1, "success": True}
        facts |= {"disaggregation_mode": "null", "message": "", "data": [{"id": MODEL, "object": "model"}]}
        return web.json_response({**facts, "internal_states": [{}], "loads": []})


def main() -> None:
    port, *ids = (int(word) for word in sys.argv[1:])
    web.run_app(Worker(ids).app(), host="127.0.0.1", port=port, print=None, access_log=None)


if __name__ == "__main__":
    main()
