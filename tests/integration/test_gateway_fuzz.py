"""The gateway's HTTP surface, fuzzed from its own OpenAPI document: no 5xx, and every answer is one that it names."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from tests.scripted import OWNER, ScriptedEngine, SumDesk, make_chat

from sluice.config.gateway import GatewayConfig
from sluice.rollout.gateway.desk import Wanted
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.session import Limits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
EXAMPLES = 6
"""Requests of each operation with each key."""


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, str]]:
    """A gateway over the scripted engine in a thread with a loop of its own: its URL and a session's key."""
    ready: Future[tuple[str, str]] = Future()
    stop: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def main() -> None:
        chat = make_chat(folder)
        limits = Limits(2048, max_turns=1_000_000, max_segments=1_000_000)
        gateway = Gateway(GatewayConfig(), engine=ScriptedEngine(chat), chat=chat, limits=limits, desk=SumDesk())
        await gateway.start()
        over = asyncio.Event()
        stop.set_result((asyncio.get_running_loop(), over))
        _, key = gateway.open(await SumDesk().lease(Wanted()))
        ready.set_result((gateway.url, key))
        await over.wait()
        await gateway.stop()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="gateway")
    thread.start()
    try:
        yield ready.result(timeout=60)
    finally:
        loop, over = stop.result(timeout=60)
        loop.call_soon_threadsafe(over.set)
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize("who", ["owner", "session"])
def test_no_request_breaks_it(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_OWNER_KEY", OWNER)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with TemporaryDirectory() as folder, served(Path(folder)) as (url, key):
        headers = {"authorization": f"Bearer {OWNER if who == 'owner' else key}"}
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", wait_for_schema=10)
        statuses: Counter[int] = Counter()
        for operation in schema.get_all_operations():
            chosen = operation.ok()

            @settings(
                max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @schemathesis_given(chosen)
            def attempt(case: Case) -> None:
                statuses[case.call_and_validate(headers=headers, checks=CHECKS, timeout=20).status_code] += 1

            attempt()
        assert sum(statuses.values()) > 60
        assert {200, 400, 403, 404} <= statuses.keys() if who == "owner" else {200, 400, 403} <= statuses.keys()


def schemathesis_given(operation: Any) -> Any:
    """Cases of one operation, well-formed and not."""
    modes = schemathesis.GenerationMode
    cases = strategies.one_of(
        operation.as_strategy(generation_mode=modes.POSITIVE), operation.as_strategy(generation_mode=modes.NEGATIVE)
    )
    return given(case=cases)
