"""Stands in for `sglang-kernel`, SGLang's compiled CUDA kernels.

Without it the server ends at start-up with "No module named 'sgl_kernel'", although no model calls one of them
on a CPU: PyTorch's own operators are taken instead. Every kernel exists here; calling one raises, so that
nothing is computed wrongly.

SGLang imports this package early in each of its processes, which makes it the place for the few calls to CUDA
that have no switch. Each of them waits for a device, or registers memory with one; there is none to wait for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is not available on the CPU")

    missing.__name__ = name
    return missing


class Cudart:
    """CUDA's run-time library, as far as memory is registered with it: routed experts keep a host buffer."""

    @staticmethod
    def cudaHostRegister(*memory: int) -> int:  # noqa: N802 - CUDA's name
        return 0

    @staticmethod
    def cudaHostUnregister(pointer: int) -> int:  # noqa: N802 - CUDA's name
        return 0

    cudaGetErrorString = staticmethod(str)  # noqa: N815 - CUDA's name


class Event:
    """A point in a stream that is always reached: a prefill server makes one when it finds a cached prefix."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make` without its argument `pin_memory`, which needs a device: adapters ask for it."""

    @functools.wraps(make)
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs)

    return made


if not torch.cuda.is_available():
    # /weights_checker fails with "Torch not compiled with CUDA enabled" otherwise
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.cudart = lambda: Cudart
    torch.cuda.Event = Event
    for name in ("empty", "zeros", "tensor"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, device=None: self
