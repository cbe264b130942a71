"""A pipe to a child process that asyncio does not own."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack


async def pipe(stack: AsyncExitStack) -> tuple[asyncio.StreamReader, int]:
    """Our end to read, the program's to write. Pipes of asyncio's own would make `wait` wait for grandchildren."""
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
    )
    stack.callback(transport.close)
    return reader, theirs
