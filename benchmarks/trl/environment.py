"""Environments of both sides under `~/.cache/sluice/bench`, made from pinned versions, and what making them took."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import xxhash

REPOSITORY = Path(__file__).parents[2]
LOCK = Path(__file__).with_name("requirements.txt")
STAMP = "installed.json"
INSTALL_SECONDS = 3_000


def home() -> Path:
    """Where environments lie; `SLUICE_HOME` moves it."""
    return Path(os.environ.get("SLUICE_HOME") or Path.home() / ".cache" / "sluice") / "bench"


def trl_python() -> Path:
    """The interpreter of TRL's environment, which is made unless it is there with the lock's versions."""
    folder = home() / "trl"
    stamp = folder / STAMP
    if not stamp.exists() or json.loads(stamp.read_text())["lock"] != _digest(LOCK):
        make_theirs()
    return folder / "bin" / "python"


def make_theirs() -> None:
    """TRL's environment, anew."""
    make(home() / "trl", ["--requirement", str(LOCK)], LOCK)


def make_ours() -> None:
    """An environment with Sluice as a user installs it, versions as in requirements.lock. Measured, never run."""
    lock = REPOSITORY / "requirements.lock"
    make(home() / "sluice", ["--constraint", str(lock), str(REPOSITORY)], lock)


def make(folder: Path, wanted: list[str], lock: Path) -> None:
    """A fresh environment with what pip is asked for. Seconds, CPU seconds and size go to its stamp."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"benchmarks.trl: making {folder}; once, some minutes", file=sys.stderr, flush=True)
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=INSTALL_SECONDS)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip.append("--no-cache-dir")  # neither side finds what an earlier installation left
    subprocess.run([*pip, *wanted], check=True, timeout=INSTALL_SECONDS, stdout=sys.stderr)
    seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    files = [file.lstat() for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    measured = {
        "lock": _digest(lock),
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "mib": round(sum(file.st_blocks * 512 for file in files) / 2**20),
        "packages": len(list(folder.glob("lib/python*/site-packages/*.dist-info"))),
        "load_average": round(os.getloadavg()[0], 1),
    }
    (folder / STAMP).write_text(json.dumps(measured, indent=1), encoding="utf-8")


def measured() -> dict[str, Any]:
    """What making each environment took, as far as it was made."""
    stamps = {side: home() / folder / STAMP for side, folder in (("sluice", "sluice"), ("trl", "trl"))}
    found = {side: json.loads(stamp.read_text()) for side, stamp in stamps.items() if stamp.exists()}
    return {side: {name: value for name, value in each.items() if name != "lock"} for side, each in found.items()}


def _digest(lock: Path) -> str:
    return xxhash.xxh3_128_hexdigest(lock.read_bytes())
