"""The way into the durable log for concurrent episodes: what arrives together is committed together."""

from __future__ import annotations

import asyncio

from sluice.log.records import Record
from sluice.log.writer import LogWriter


class Journal:
    """Group commit over a `LogWriter`: `write` returns when its records are durable."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._waiting: list[tuple[tuple[Record, ...], asyncio.Future[None]]] = []

    async def write(self, *records: Record) -> None:
        """Append records in order. Raises LogError when they cannot be written."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append((records, done))
        await done

    def write_now(self, *records: Record) -> int:
        """Append records at once and return the log's cursor behind them."""
        return self._writer.append_many(records)[-1]

    def sync(self) -> int:
        """Force everything appended so far to disk; the cursor behind it."""
        return self._writer.sync()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            self._writer.append_many([record for records, _ in waiting for record in records])
        except Exception as error:  # noqa: BLE001 - handed to every writer, who raises it
            for _, done in waiting:
                if not done.done():
                    done.set_exception(error)
            return
        for _, done in waiting:
            if not done.done():
                done.set_result(None)
