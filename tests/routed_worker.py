"""A small server that answers like SGLang's HTTP API, for tests of the router. Run as a program:

    python tests/routed_worker.py PORT NAME [prefill|decode]

What a request asks of it is in the request: `hold` waits until POST /release, `die` ends the process while the
request runs, `fail` answers 500. Everything else comes back under `seen`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PORT, NAME = int(sys.argv[1]), sys.argv[2]
ROLE = sys.argv[3] if len(sys.argv) > 3 else "null"
MODEL = "tiny"
RELEASED = threading.Event()
SEEN: list[dict[str, Any]] = []
HEALTHY = threading.Event()
HEALTHY.set()
INFO = {
    "model_path": MODEL, "served_model_name": MODEL, "tokenizer_path": MODEL, "is_generation": True,
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "weight_version": "default",
    "tp_size": 1, "dp_size": 1, "version": "0.5.21", "disaggregation_mode": ROLE, "internal_states": [{}],
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _send(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path in ("/health", "/health_generate"):
            self._send({}, 200 if HEALTHY.is_set() else 503)
        elif path in ("/model_info", "/get_model_info", "/server_info", "/get_server_info"):
            self._send(INFO)
        elif path == "/v1/models":
            self._send({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        elif path == "/seen":
            self._send(SEEN)
        else:
            self._send({"error": "unknown"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        if self.path == "/release":
            RELEASED.set()
            self._send({})
        elif self.path == "/sicken":
            HEALTHY.clear()
            self._send({})
        elif self.path == "/generate":
            SEEN.append({"headers": {name.lower(): value for name, value in self.headers.items()}, "body": body})
            self._generate(body)
        else:
            self._send({"error": "unknown"}, 404)

    def _generate(self, body: dict[str, Any]) -> None:
        if NAME in body.get("die", ()):
            os._exit(1)
        if NAME in body.get("fail", ()):
            self._send({"error": {"message": "no"}}, 500)
        elif body.get("stream"):
            self._stream(body)
        else:
            if body.get("hold"):
                RELEASED.wait(60)
            self._send(self._answer(body))

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        meta = {
            "id": body.get("rid", ""), "finish_reason": {"type": "stop"}, "name": NAME, "routed_experts": "AAEC",
            "weight_versions": [["v0", 0, 1], ["v1", 1, 2]], "cached_tokens": 0,
        }  # fmt: skip
        return {"text": "x", "output_ids": [1, 2], "meta_info": meta, "seen": body}

    def _stream(self, body: dict[str, Any]) -> None:
        """One event, then one more once released: a router that buffers shows nothing before."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._event(json.dumps(self._answer(body)))
        RELEASED.wait(60)
        if NAME in body.get("die_later", ()):
            os._exit(1)
        self._event(json.dumps(self._answer(body)))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


Server(("127.0.0.1", PORT), Handler).serve_forever()
