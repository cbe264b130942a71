"""`sluice engines`: inference engines in environments of their own, each from a lock that ships with Sluice.

A trainer and an engine never share an environment: each pins its own torch. Installing is atomic in effect: a
marker is written last, with the lock's hash. An environment without it, or of another lock, is made afresh.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sluice.errors import ConfigError, EngineError
from sluice.nearest import nearest
from sluice_engine import environments
from sluice_engine.environments import BUILDS, MARKER, Build

ENGINES = ("sglang",)
LOCKED_PYTHON = "3.11"
"""The locks hold for this version, on Linux."""
WAIT_SECONDS = 1800.0
"""For another installation into the same folder."""
NEEDED_BYTES: Mapping[str, int] = {"cpu": 3 * 1024**3, "cuda": 20 * 1024**3, "rocm": 20 * 1024**3}
"""Free disk: the environment, and pip's downloads while it installs."""
RDMA = {"libibverbs.so.1": "libibverbs1", "librdmacm.so.1": "librdmacm1"}
"""Libraries that mooncake loads even where it transfers over TCP, and the Debian packages that have them."""
_CHECKS: Mapping[str, str] = {
    "cpu": "import torch, transformers, smg",
    "cuda": "import torch, smg; assert torch.version.cuda, 'pip found a torch without CUDA'",
    "rocm": "import torch, smg; assert torch.version.hip, 'pip found a torch without ROCm: set PIP_INDEX_URL'",
}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Installed:
    """One build, as `sluice engines list` shows it."""

    engine: str
    build: str
    state: str
    folder: str

    def __str__(self) -> str:
        return f"{self.engine:<7} {self.build:<5} {self.state:<11} {self.folder}"

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self)


def listed() -> list[Installed]:
    """Every build, where it is or would be, and its state."""
    folders = {build: environments.folder(build) for build in BUILDS}
    return [
        Installed("sglang", build, environments.state(build, folder), str(folder)) for build, folder in folders.items()
    ]


def chosen(engine: str, *, cpu: bool, cuda: bool, rocm: bool) -> Build:
    """The build that is asked for; the one that fits this machine when none is.

    Raises:
        ConfigError: an unknown engine, or two builds at once.
    """
    if engine not in ENGINES:
        meant = nearest(engine, ENGINES)
        raise ConfigError(
            f"no engine is called {engine!r}",
            hint=f"did you mean {meant}?" if meant else f"there is one: {', '.join(ENGINES)}",
        )
    flags: dict[Build, bool] = {"cpu": cpu, "cuda": cuda, "rocm": rocm}
    asked: list[Build] = [build for build, flag in flags.items() if flag]
    if len(asked) > 1:
        raise ConfigError(f"--{' and --'.join(asked)} are different environments", hint="install one at a time")
    return asked[0] if asked else _fitting()


def _fitting() -> Build:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def install(build: Build, folder: Path | None = None, *, say: Say, environ: Mapping[str, str] = os.environ) -> Path:
    """Make the environment of a build, unless it is there already.

    pip takes its configuration from the environment as usual. The CPU build is 1.6 GB with a CPU wheel of torch:
    set PIP_INDEX_URL or PIP_FIND_LINKS where the default index has only the CUDA wheel (7 GB).

    Args:
        folder: where; None is the place where recipes look for it.
        say: told what happens, in a line each.
        environ: PYTHON in it names the interpreter.

    Returns:
        The environment's interpreter.

    Raises:
        ConfigError: the folder holds something else, or there is no Python of the right version.
        EngineError: a step failed, with the end of its output; another installation takes too long; disk is full.
    """
    target = (folder or environments.folder(build, environ)).absolute()
    with _alone(target):
        state = environments.state(build, target)
        python = environments.python_in(target)
        if state == "foreign":
            raise ConfigError(
                f"{target} exists and was not made by sluice engines install",
                hint="choose another --folder, or remove it yourself",
            )
        if state == "ready":
            say(f"{target} is up to date")
        else:
            base = _base_python(environ)
            _refuse_small_disk(build, target)
            say(f"installing SGLang ({build}) into {target}; minutes, the log is {target / 'install.log'}")
            _make(build, target, base, say)
            say(f"done: {python}")
    _advise(build, say)
    return python


def _make(build: Build, target: Path, base: str, say: Say) -> None:
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    marker = target / MARKER
    marker.touch()
    log = target / "install.log"
    lock = str(environments.lock_of(build))
    python = str(environments.python_in(target))
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    _step([base, "-m", "venv", str(target)], log)
    if build == "cuda":
        say("SGLang with all its dependencies")
        _step([*pip, "--requirement", lock], log)
    else:
        # torch brings its own dependencies, at the locked versions. The rest comes without: SGLang declares CUDA
        # packages (flashinfer, cutlass, nvshmem and others, 10 GB) that are of no use here.
        say("torch")
        _step([*pip, "--constraint", lock, "torch"], log)
        say("everything else in the lock")
        _step([*pip, "--no-deps", "--requirement", lock], log)
    _step([python, "-c", _CHECKS[build]], log)
    marker.write_text(environments.stamp_of(build), encoding="utf-8")


def _step(command: Sequence[str], log: Path) -> None:
    with log.open("ab") as output:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise EngineError(
            f"`{' '.join(command)}` failed with exit code {code}. The end of {log}:\n{tail}",
            hint="check the network, pip's configuration and the free disk, then run this again",
        )


def _base_python(environ: Mapping[str, str]) -> str:
    """PYTHON, else the running interpreter when it has the locked version, else python3.11."""
    named = environ.get("PYTHON")
    running = ".".join(map(str, sys.version_info[:2]))
    python = named or (sys.executable if running == LOCKED_PYTHON else f"python{LOCKED_PYTHON}")
    ask = [python, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
    name_one = f"name one: PYTHON=/path/to/python{LOCKED_PYTHON} sluice engines install sglang"
    try:
        reply = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"cannot run {python}: {error}", hint=f"install Python {LOCKED_PYTHON}, or {name_one}"
        ) from error
    if reply.returncode:
        why = (reply.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(
            f"{python} cannot make environments: {why}",
            hint=f"on Debian: apt-get install python{LOCKED_PYTHON}-venv; or {name_one}",
        )
    if reply.stdout.strip() != LOCKED_PYTHON:
        raise ConfigError(f"{python} is Python {reply.stdout.strip()}, the lock is for {LOCKED_PYTHON}", hint=name_one)
    return python


def _refuse_small_disk(build: Build, target: Path) -> None:
    there = target
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < NEEDED_BYTES[build]:
        gib = 1024**3
        raise EngineError(
            f"{free / gib:.1f} GiB are free at {there}; the {build} build needs {NEEDED_BYTES[build] / gib:.0f}",
            hint="free some, or choose another disk with --folder or SLUICE_HOME",
        )


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Two installations into one folder: the second waits, then finds the work done."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(target.name + ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot write beside {target}: {error}", hint="choose another --folder") from error
    with lock:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"another installation into {target} has run for {WAIT_SECONDS / 60:.0f} minutes",
                        hint="end it, then run this again",
                    ) from error
                time.sleep(0.5)
        yield


def missing_libraries() -> list[str]:
    """Debian packages that prefill/decode engines on a CPU need and this machine lacks."""
    missing: list[str] = []
    for library, package in RDMA.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            missing.append(package)
    return missing


def _advise(build: Build, say: Say) -> None:
    """What the environment needs and pip cannot bring."""
    if build == "cpu" and (missing := missing_libraries()):
        say(f"prefill and decode engines also need system libraries: apt-get install -y {' '.join(missing)}")
    if build == "rocm":
        say(
            "SGLang's kernels for ROCm are not on any package index: build sgl-kernel from its source "
            "(setup_rocm.py) with this environment's Python. This recipe has not been run."
        )
