"""Replace a file as a whole: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` through a temporary file in the same folder, flushed to disk."""
    torn = path.with_name(f".{path.name}.tmp")
    with torn.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    torn.replace(path)
