"""The router: stock `smg` (Shepherd Model Gateway) as a process of its own, one per run.

What it is told and what was seen with smg 1.13.0 (`tests/integration/test_router.py`):

* It starts without workers, in prefill/decode mode too; they come and go over its API. Not so `power_of_two`,
  which is therefore given two that can never be; in prefill/decode mode the router refuses it, in its own words.
* `manual` and `consistent_hashing` keep a value of the header `X-SMG-Routing-Key` at one worker; the response
  header `x-smg-routed-worker-id` is that worker's URL. Fields it does not know pass in both directions.
* Liveness is ours, so its own judgements are switched off: health checks and the circuit breaker (a long pause
  looks like death), overload protection (8 waiting requests), wedge detection (3 s without a token) and stall
  detection (2 s without contact), each of which would move sessions away from their cache during a weight update.
  So is its limit of concurrent requests, by default 1,024 per core and 429 beyond.
* A worker that dies under a request, or answers 500: it is tried elsewhere, and the key goes home afterwards. With
  nobody else the caller gets 500 `call_upstream_connection_failed`; the fleet sends again.
* A worker that dies in the middle of a stream: the stream goes on with an event that has `error.type`
  `stream_error`, and ends with `[DONE]` as if all were well. The event is what tells.
* A removed worker finishes what it runs. A killed router takes its streams along; another one may have its port.

The older `sglang-router` is refused: it drops what it does not know from requests, silently.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sluice.config.router import RouterConfig
from sluice.config.sglang import Flag
from sluice.errors import CapabilityError, EngineError
from sluice.rollout.process import ManagedProcess, flags, reserve_port, start_on_port

HOST = "127.0.0.1"
NEVER_SECONDS = 30 * 24 * 3600
"""For its deadlines, all of which are ours."""
NOBODY = ["http://127.0.0.1:0", "http://127.0.0.2:0"]
"""Workers that can never be: `power_of_two` does not start with fewer than two. They are not registered."""
POLL_SECONDS = 0.1
_PROBE = (
    "import importlib.metadata as m\n"
    "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
    "print(names.get('smg', ''), names.get('sglang-router', names.get('sglang_router', '')), sep=',')\n"
)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """An engine as the router sees it."""

    id: str
    url: str
    role: str
    healthy: bool


class Router:
    """One smg process.

    Args:
        config: policy and thresholds.
        python: interpreter of an environment with `smg`.
        log_path: its output.
        pd: workers are prefill and decode servers.
        api_key: bearer token that the router sends to workers; goes over its API, never on a command line.
    """

    def __init__(
        self, config: RouterConfig, *, python: Path, log_path: Path, pd: bool = False, api_key: str = ""
    ) -> None:
        self._config, self._python, self._log_path = config, config.python or python, log_path
        self._pd, self._api_key = pd, api_key
        self._process: ManagedProcess | None = None
        self._client: httpx.AsyncClient | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """`http://host:port`; empty before `start`."""
        return self._url

    @property
    def process(self) -> ManagedProcess:
        if self._process is None:
            raise EngineError("the router is not started, or closed", hint="await start() first")
        return self._process

    def command(self, port: int, metrics_port: int) -> list[str]:
        """Its command line. `args` of the recipe come last: a repeated flag overrides an earlier one."""
        config = self._config
        typed: dict[str, Flag | None] = {
            "host": HOST,
            "port": port,
            "prometheus-host": HOST,
            "prometheus-port": metrics_port,
            "policy": config.policy,
            "assignment-mode": config.assignment if config.policy == "manual" else None,
            "cache-threshold": config.cache_threshold,
            "balance-abs-threshold": config.balance_abs_threshold,
            "balance-rel-threshold": config.balance_rel_threshold,
            "pd-disaggregation": self._pd or None,
            "prefill-policy": config.prefill_policy or None,
            "decode-policy": config.decode_policy or None,
            "disable-health-check": True,
            "disable-circuit-breaker": True,
            "disable-worker-overload-protection": True,
            "worker-wedge-secs": NEVER_SECONDS,
            "worker-stall-secs": NEVER_SECONDS,
            "request-timeout-secs": NEVER_SECONDS,
            "retry-max-retries": 2,
            "max-concurrent-requests": 0,
            "worker-startup-check-interval": 1,
            "worker-startup-timeout-secs": math.ceil(config.start_seconds),
            "worker-urls": NOBODY if config.policy == "power_of_two" and not self._pd else None,
            "shutdown-grace-period-secs": 1,
            "log-level": "warn",
        }
        given = {name: value for name, value in typed.items() if value is not None}
        return [str(self._python), "-m", "smg", "launch", *flags(given), *flags(config.args)]

    async def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            CapabilityError: the environment has no smg, or only the old router.
            EngineError: it did not start; with the end of its log.
        """
        if not self._python.exists():
            raise EngineError(
                f"there is no Python at {self._python} to run the router with",
                hint="sluice engines install sglang, or set rollout.router.python",
            )
        await self._refuse_wrong_router()
        with reserve_port(HOST) as metrics_port:
            self._process, self._url = await start_on_port(
                lambda port: self._start(port, metrics_port), host=HOST, port=self._config.port
            )
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        self._client = httpx.AsyncClient(base_url=self._url, timeout=self._config.start_seconds, headers=headers)

    async def _start(self, port: int, metrics_port: int) -> tuple[ManagedProcess, str]:
        url = f"http://{HOST}:{port}"
        process = await ManagedProcess.start(
            "the router",
            self.command(port, metrics_port),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            log_path=self._log_path,
            ready=lambda: _answers(url),
            seconds=self._config.start_seconds,
        )
        return process, url

    async def _refuse_wrong_router(self) -> None:
        probe = await asyncio.create_subprocess_exec(
            str(self._python), "-c", _PROBE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(self._config.start_seconds):
            out, _ = await probe.communicate()
        smg, _, old = out.decode(errors="replace").strip().partition(",")
        if smg:
            return
        if old:
            raise CapabilityError(
                f"{self._python} has sglang-router {old}, which silently drops return_routed_experts, and on chat "
                "routes input_ids, rid and return_meta_info, from every request",
                hint="install its successor: sluice engines install sglang, or pip install smg==1.13.0 there",
            )
        raise CapabilityError(
            f"{self._python} has no router (smg)",
            hint="sluice engines install sglang, or set rollout.router.python to an interpreter that has smg",
        )

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────────

    async def add(self, url: str, *, role: str = "regular", bootstrap_port: int | None = None) -> None:
        """Route to a server from now on. Returns when the router does; adding one that it has is harmless.

        Raises:
            EngineError: the router refused it, or did not take it within `start_seconds`.
        """
        body: dict[str, Any] = {"url": url, "worker_type": role}
        if bootstrap_port is not None:
            body["bootstrap_port"] = bootstrap_port
        if self._api_key:
            body["api_key"] = self._api_key
        await self._call("POST", "/workers", body, accept=(409,))
        await self._until(lambda workers: any(each.url == url and each.healthy for each in workers), f"take {url}")

    async def remove(self, url: str) -> None:
        """Route nothing there any more. Requests that run there go on. Unknown servers are ignored."""
        for worker in await self.workers():
            if worker.url == url:
                await self._call("DELETE", f"/workers/{worker.id}", None, accept=(404,))
        await self._until(lambda workers: all(each.url != url for each in workers), f"let go of {url}")

    async def workers(self) -> list[WorkerInfo]:
        """Every server that it knows."""
        rows = (await self._call("GET", "/workers", None)).get("workers", [])
        return [
            WorkerInfo(str(row["id"]), str(row["url"]), str(row.get("worker_type", "")), bool(row.get("is_healthy")))
            for row in rows
        ]

    async def _until(self, holds: Callable[[list[WorkerInfo]], bool], what: str) -> None:
        deadline = time.monotonic() + self._config.start_seconds
        while not holds(await self.workers()):
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the router did not {what} within {self._config.start_seconds:g} s: {self.process.last_error()}",
                    hint=f"its log is {self._log_path}",
                )
            await asyncio.sleep(POLL_SECONDS)

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None, accept: Sequence[int] = ()
    ) -> dict[str, Any]:
        if self._client is None:
            raise EngineError("the router is not started, or closed", hint="await start() first")
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise EngineError(
                f"the router at {self._url} cannot be reached for {method} {path}: {error or type(error).__name__}",
                hint=f"its log is {self._log_path}",
            ) from error
        if not response.is_success and response.status_code not in accept:
            raise EngineError(
                f"the router refused {method} {path} with status {response.status_code}: {response.text[:300]}"
            )
        try:
            reply = response.json() if response.content else {}
        except ValueError:
            reply = {}
        return reply if isinstance(reply, dict) else {}

    # ── its end ─────────────────────────────────────────────────────────────────────────────────────────

    async def ended(self) -> str:
        """Wait until its process ends by itself. Returns why, as far as its log tells."""
        process = self.process
        code = await process.wait()
        return f"it ended with exit code {code}: {process.last_error()}"

    async def close(self) -> None:
        """End the process; workers are left alone. Harmless when repeated."""
        client, process, self._client, self._process = self._client, self._process, None, None
        if client is not None:
            await client.aclose()
        if process is not None:
            await process.stop(grace=5.0)


async def _answers(url: str) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=5.0) as client:
        try:
            return (await client.get("/health")).is_success
        except httpx.HTTPError:
            return False
