"""The only file that names a vendor: which device, how many threads, how much memory is free."""

from __future__ import annotations

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


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads in torch; None leaves torch's choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def platform(device: str) -> str:
    """`cpu`, `cuda` or `rocm`: which build of an engine goes with a resolved device."""
    if device == "cpu":
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"
