"""Limits of code that is run for a tool or a verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sluice.config.base import Part


class SandboxConfig(Part):
    """How far a program may go. What this protects against, and what not, is in docs/rewards.md."""

    seconds: float = Field(default=10.0, gt=0)
    """Deadline of a program."""
    cpu_seconds: int = Field(default=5, ge=1)
    """CPU time of one process."""
    memory_bytes: int = Field(default=1024**3, ge=32 * 1024**2)
    """Address space of one process."""
    file_bytes: int = Field(default=16 * 1024**2, ge=4096)
    """Largest file it may write."""
    folder_bytes: int = Field(default=64 * 1024**2, ge=4096)
    """All files of its folder together; where namespaces are not permitted only single files are limited."""
    processes: int = Field(default=16, ge=1)
    """Processes and threads at once."""
    open_files: int = Field(default=64, ge=16)
    """Open files of one process."""
    output_bytes: int = Field(default=1024**2, ge=1)
    """Output on stdout, and on stderr; beyond it the program is ended."""
    concurrent: int | None = Field(default=None, ge=1)
    """Programs at once; further ones wait their turn. None takes the number of CPUs."""
    isolation: Literal["full", "any"] = "full"
    """`full` needs namespaces: no network, no other process in sight, no file but the interpreter's, and is refused at
    start where the kernel does not permit them. `any` then goes on with limits alone."""
    python: Path | None = None
    """Interpreter; None takes the one that runs Sluice, with the packages of its environment."""
