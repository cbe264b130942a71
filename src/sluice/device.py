"""The only file that names a vendor: which device, how many threads, how much memory is free."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from sluice.errors import ConfigError


def resolve(name: str) -> str:
    """`auto` becomes the first accelerator, or the CPU; anything else is checked.

    ROCm builds of torch answer to `cuda` as well.

    Raises:
        ConfigError: the device does not exist here.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ConfigError(f"device = {name!r} is not known", hint="use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise ConfigError(f"device = {name!r}, but {count} accelerators are visible", hint="use device=cpu or auto")
    return f"cuda:{index or 0}"


def index(device: str) -> int:
    """Number of a resolved accelerator among those this process sees; 0 for the CPU."""
    return int(device.partition(":")[2] or 0)


def several(device: str, count: int) -> list[str]:
    """The devices of `count` ranks: the CPU for each, or one accelerator each, from `device` on.

    Raises:
        ConfigError: there are not so many here.
    """
    if device == "cpu":
        return [device] * count
    first, there = index(device), torch.cuda.device_count()
    if first + count > there:
        raise ConfigError(
            f"train.ranks = {count} wants an accelerator each, from {device} on, and {there} are visible",
            hint="lower train.ranks, or start where there are more",
        )
    return [f"cuda:{first + number}" for number in range(count)]


def visible(device: str) -> list[str]:
    """The accelerators that this process sees, as `CUDA_VISIBLE_DEVICES` names them; none on a CPU."""
    if device == "cpu":
        return []
    ours = os.environ.get(VISIBLE)
    return ours.split(",") if ours else [str(number) for number in range(torch.cuda.device_count())]


def total_memory(device: str) -> int:
    """Bytes of the accelerator; on a CPU of the host, or what the container may use of it."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [psutil.virtual_memory().total]
    with suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(limits)


def order_launches() -> None:
    """Have an accelerator start kernels in the order in which this process sends them, whatever their streams, unless
    its user chose otherwise. To be called before anything is on the accelerator; harmless on a CPU."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads in torch; None leaves torch's choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def platform(device: str) -> str:
    """`cpu`, `cuda` or `rocm`: which build of an engine goes with a resolved device."""
    if device == "cpu":
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def collectives(device: str) -> str:
    """The backend of collective calls between processes on such a device; ROCm's answers to `nccl` as well."""
    return "gloo" if device == "cpu" else "nccl"


def peak_memory(kind: str) -> int:
    """Bytes of this process at most so far: on its current accelerator, or resident on a CPU."""
    if kind == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def synchronize(device: torch.device | str) -> None:
    """Wait for what was asked of the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def memory_in_use(device: torch.device | str) -> int:
    """Bytes in use now: of the accelerator, by all processes; of this process, on a CPU."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def free_cached(device: torch.device | str) -> None:
    """Give back to the device what torch keeps of it without use, so that another process can have it."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Which accelerators a process sees, by their names on the host; unset: all."""


def is_visible_to(device: str, environ: Mapping[str, str]) -> bool:
    """Whether a process of this host with the environment `environ` sees the accelerator that is `device` here."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return False
    ours, theirs = os.environ.get(VISIBLE), environ.get(VISIBLE)
    if ours == theirs:
        return True
    name = ours.split(",")[int(index or 0)] if ours else str(int(index or 0))
    return theirs is None or name in theirs.split(",")


def uuid(index: int) -> str:
    """What the accelerator `index` is called in every process of this host."""
    return str(torch.cuda.get_device_properties(index).uuid)


def collect_shared() -> None:
    """Free accelerator memory that was shared with other processes, once they have let go of it."""
    torch.cuda.ipc_collect()
