"""Where the engines' own environments are, and whether they are what their locks say.

$SLUICE_HOME/engines/sglang-BUILD/          SLUICE_HOME is ~/.cache/sluice by default
    .sluice-engine                          hash of the lock, written when the installation is complete
    bin/python
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

Build = Literal["cpu", "cuda", "rocm"]
BUILDS: tuple[Build, ...] = ("cpu", "cuda", "rocm")
MARKER = ".sluice-engine"
LOCKS = Path(__file__).parent / "locks"


def folder(build: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Where `sluice engines install` puts a build by default."""
    home = Path(environ.get("SLUICE_HOME") or Path.home() / ".cache" / "sluice")
    return home / "engines" / f"sglang-{build}"


def python_in(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / "bin" / "python"


def lock_of(build: str) -> Path:
    """The exact versions of a build; a pip requirements file."""
    return LOCKS / f"sglang-{build}.lock"


def stamp_of(build: str) -> str:
    """What the marker of a complete and current environment says."""
    return hashlib.sha256(lock_of(build).read_bytes()).hexdigest()


def state(build: str, environment: Path) -> Literal["missing", "foreign", "incomplete", "outdated", "ready"]:
    """Of an environment: `foreign` was not made by us, `outdated` was made from another lock."""
    marker = environment / MARKER
    if not marker.is_file():
        there = environment.exists() and (not environment.is_dir() or any(environment.iterdir()))
        return "foreign" if there else "missing"
    stamp = marker.read_text(encoding="utf-8").strip()
    if not stamp or not python_in(environment).exists():
        return "incomplete"
    return "ready" if stamp == stamp_of(build) else "outdated"
