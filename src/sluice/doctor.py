"""`sluice doctor`: whether this machine can do what Sluice needs, and the next move where it cannot."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from sluice_engine import environments

GIB = 1024**3
_FREE_MEMORY = 2 * GIB
"""A small model with its optimizer and KV cache; measured for the demo: below 1 GiB."""
_FREE_DISK = 1 * GIB
"""Checkpoints and log of a small run."""
_SHARED_MEMORY = 64 * 1024**2
"""Docker's default; weights for SGLang pass through it in buckets."""
_LOCKED_PYTHON = (3, 11)
_LOCK = Path(__file__).parents[2] / "requirements.lock"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. `move` says what to do; it is empty when all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    move: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<4}  {self.name:<14} {self.found}"
        return f"{line}\n      {'':<14} → {self.move}" if self.move else line

    def to_json(self) -> dict[str, Any]:
        """The check as a JSON object."""
        return asdict(self)


def examine(runs_dir: Path, *, lock: Path = _LOCK) -> list[Check]:
    """Every check, in the order of the report."""
    return [
        _python(),
        _versions(lock),
        _device(),
        _memory(),
        _disk(runs_dir),
        _cores(),
        _shared_memory(Path("/dev/shm")),
        _sglang(),
    ]


def _python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] != _LOCKED_PYTHON:
        return Check("python", "warn", found, "the lock is tested with Python 3.11; make setup PYTHON=python3.11")
    return Check("python", "ok", found)


def _versions(lock: Path) -> Check:
    """Installed packages against the lock; a local build (`2.13.0+cpu`) satisfies its pin."""
    if not lock.is_file():
        return Check("versions", "warn", "no requirements.lock beside the package", "run from a checkout to compare")
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    missing: list[str] = []
    other: list[str] = []
    for name, pinned in pins:
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            missing.append(name)
            continue
        if installed != pinned:
            other.append(f"{name} {installed} (lock: {pinned})")
    if not missing and not other:
        return Check("versions", "ok", f"all {len(pins)} packages as in the lock")
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"other: {', '.join(other)}"] if other else []
    return Check("versions", "warn", "; ".join(parts), "make setup installs the locked versions")


def _device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", "fail", f"torch cannot be imported: {error}", "make setup")
    from sluice import device

    resolved = device.resolve("auto")
    name = torch.cuda.get_device_name(resolved) if resolved != "cpu" else f"{torch.get_num_threads()} threads"
    return Check("device", "ok", f"{resolved} ({name}), torch {torch.__version__}")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < _FREE_MEMORY:
        return Check("memory", "warn", found, "end other programs, or use a smaller model and train.logprob_chunk")
    return Check("memory", "ok", found)


def _disk(runs_dir: Path) -> Check:
    """Space and write permission where run folders go, or would be made."""
    there = runs_dir.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free for {runs_dir}"
    if not os.access(there, os.W_OK):
        return Check("disk", "fail", f"{there} is not writable", "set runs_dir to a folder of yours")
    if free < _FREE_DISK:
        return Check("disk", "fail", found, "free some space, or set runs_dir to another disk")
    return Check("disk", "ok", found)


def _cores() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable < 2:
        return Check("cores", "warn", "1 usable core", "rollout and training take turns; expect half the speed")
    return Check("cores", "ok", f"{usable} usable cores")


def _shared_memory(folder: Path) -> Check:
    if not folder.is_dir():
        return Check("shared memory", "warn", f"no {folder}", "with SGLang use rollout.sglang.sync=disk")
    size = shutil.disk_usage(folder).total
    found = f"{size / GIB:.2f} GiB in {folder}"
    if size <= _SHARED_MEMORY:
        move = "start the container with --shm-size=2g, or use rollout.sglang.sync=disk"
        return Check("shared memory", "warn", found, move)
    return Check("shared memory", "ok", found)


def _sglang() -> Check:
    """The engines' own environments, as `sluice engines install` makes them."""
    states = {build: environments.state(build, environments.folder(build)) for build in environments.BUILDS}
    there = {build: state for build, state in states.items() if state != "missing"}
    if not there:
        return Check("sglang", "warn", "not installed", "needed only to run SGLang here: sluice engines install sglang")
    found = ", ".join(f"{state} at {environments.folder(build)}" for build, state in there.items())
    broken = [build for build, state in there.items() if state != "ready"]
    if broken:
        return Check("sglang", "warn", found, f"sluice engines install sglang --{broken[0]}")
    return Check("sglang", "ok", found)
