"""Calls of a service that scores: limited in number, repeated where that helps, never without a deadline."""

from __future__ import annotations

import asyncio
import json
import os
import random
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx

from sluice.config.rewards import RemoteRewardBase
from sluice.errors import RewardError
from sluice.rewards.means import Means

MAX_BACKOFF_SECONDS = 30.0
MAX_REPLY_BYTES = 4 * 1024**2
"""A longer reply is no score."""
_SHOWN = 300


class ServiceError(Exception):
    """The service gave no usable answer. The message says why and holds no key."""


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why an attempt failed that may be repeated; the service may say when."""

    why: str
    retry_after: float = 0.0


class Service:
    """One HTTP endpoint that takes and returns JSON.

    Raises:
        RewardError: the environment variable that should hold its key is not set.
    """

    def __init__(self, config: RemoteRewardBase, url: str, means: Means) -> None:
        self._config, self._url, self._means = config, url, means
        self._slots = asyncio.Semaphore(config.concurrent)
        self._key = ""
        if config.api_key_env:
            self._key = os.environ.get(config.api_key_env, "")
            if not self._key:
                raise RewardError(
                    f"api_key_env names {config.api_key_env}, which is not set",
                    hint=f"export {config.api_key_env}, or leave api_key_env out",
                )

    async def post(self, body: Any) -> Any:
        """The JSON that the service answers with.

        Raises:
            ServiceError: it cannot be reached, refuses, or answers with something else, within the deadline.
        """
        data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        async with self._slots:
            return await self._repeat(self._means.client, data)

    async def _repeat(self, client: httpx.AsyncClient, data: bytes) -> Any:
        config, clock = self._config, asyncio.get_running_loop().time
        until, backoff, attempt, why = clock() + config.seconds, config.backoff_seconds, 0, ""
        while True:
            attempt += 1
            left = until - clock()
            got = await self._once(client, data, min(config.attempt_seconds, left))
            if not isinstance(got, _Fault):
                return self._read(got)
            if not why or left >= config.attempt_seconds:  # an attempt cut short tells less than the one before
                why = got.why
            wait = max(backoff * random.uniform(0.5, 1.0), got.retry_after)
            ends = clock() + wait >= until
            if not ends:
                await asyncio.sleep(wait)
            if ends or clock() >= until:
                times = f"{attempt} attempts" if attempt > 1 else "one attempt"
                raise ServiceError(f"{self._url} gave no answer within {config.seconds:g} s, in {times}; at last {why}")
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    async def _once(self, client: httpx.AsyncClient, data: bytes, seconds: float) -> bytes | _Fault:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            async with (
                asyncio.timeout(seconds),
                client.stream("POST", self._url, content=data, headers=headers) as response,
            ):
                content = await self._content(response)
                status = response.status_code
                if response.is_success:
                    return content
                if status == HTTPStatus.TOO_MANY_REQUESTS or response.is_server_error:
                    why = f"it answered with status {status}: {self._show(content)}"
                    return _Fault(why, _seconds(response.headers.get("Retry-After", "")))
                raise ServiceError(f"{self._url} refused with status {status}: {self._show(content)}")
        except TimeoutError:
            return _Fault(f"it did not answer within {seconds:.3g} s")
        except httpx.TransportError as error:
            return _Fault(f"it could not be reached: {self._hide(str(error)) or type(error).__name__}")

    async def _content(self, response: httpx.Response) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_REPLY_BYTES:
                raise ServiceError(f"{self._url} answered with more than {MAX_REPLY_BYTES} bytes")
        return bytes(content)

    def _read(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ServiceError(f"{self._url} answered with what is no JSON: {self._show(content)}") from error

    def _show(self, content: bytes) -> str:
        text = self._hide(content.decode(errors="replace")).strip()
        return (text[:_SHOWN] + "…" if len(text) > _SHOWN else text) or "nothing"

    def _hide(self, text: str) -> str:
        """`text` without the key, should a service repeat it."""
        return text.replace(self._key, f"[{self._config.api_key_env}]") if self._key else text


def _seconds(retry_after: str) -> float:
    """The header's seconds; 0 for a date, which services rarely send, and for anything else."""
    return float(retry_after) if retry_after.strip().isdecimal() else 0.0
