"""Sends requests as fast as the server answers, some at a time, from a process of its own.

    python -m benchmarks.http_load < plan.json

The plan: `{"url", "parallel", "seconds", "lanes": [{"headers", "bodies": [..]}]}`. Each of `parallel` senders takes the
next lane, posts its bodies in order, then takes another, until the lanes or the seconds are used up. Prints
`{"requests", "seconds", "latencies", "statuses"}` as JSON, latencies in milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import aiohttp


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    lanes = iter(plan["lanes"])
    latencies: list[float] = []
    statuses: Counter[int] = Counter()
    begin = time.monotonic()

    async def sender(client: aiohttp.ClientSession) -> None:
        for lane in lanes:
            for body in lane["bodies"]:
                if time.monotonic() - begin > plan["seconds"]:
                    return
                sent = time.monotonic()
                async with client.post(plan["url"], data=body, headers=lane["headers"]) as response:
                    await response.read()
                latencies.append((time.monotonic() - sent) * 1e3)
                statuses[response.status] += 1

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as client:
        await asyncio.gather(*(sender(client) for _ in range(plan["parallel"])))
    seconds = time.monotonic() - begin
    return {"requests": len(latencies), "seconds": seconds, "latencies": latencies, "statuses": dict(statuses)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))))
