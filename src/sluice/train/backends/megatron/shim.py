"""Lets megatron-core run on a CPU over gloo. Nothing here is active where there is a GPU.

megatron-core has no device switch: it names CUDA in the ways that are answered below, each once. All of it is
global to the process, which must be a rank's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Literals `device="cuda"`, `Tensor.cuda()`, pinned memory, and optimizers that compare names of tensor types."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and args[0].device.type == "cpu":
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


class _Inert:
    """A stream or an event, where everything is synchronous."""

    def __getattr__(self, name: str) -> Callable[..., _Inert]:
        return lambda *args, **kwargs: self


def install() -> None:
    """Call once, before anything of megatron-core is imported. Harmless when repeated, and where there is a GPU."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_sluice_shim", False):
        return
    torch.cuda._sluice_shim = True  # pyright: ignore[reportAttributeAccessIssue]
    _name_the_cpu()
    _CudaMeansCpu().__enter__()
    _without_compiler()
    _without_device_generators()


def _always(value: Any) -> Callable[..., Any]:
    """A function of its own each time: the compiler refuses one object under two names."""
    return lambda *args, **kwargs: value() if callable(value) else value


def _name_the_cpu() -> None:
    stream = _Inert()
    answers = {
        "current_device": _CPU, "device_count": 1, "set_device": None, "synchronize": None, "empty_cache": None,
        "get_rng_state": torch.get_rng_state, "set_rng_state": None,
        "current_stream": lambda: stream, "default_stream": lambda: stream,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch.cuda.Stream = torch.cuda.Event = lambda *args, **kwargs: _Inert()  # pyright: ignore


def _without_compiler() -> None:
    """Its small functions would be compiled as they are imported, which takes longer than a test does."""
    from megatron.core import jit

    jit.disable_jit_fuser()


def _without_device_generators() -> None:
    """There is one generator on a CPU, so dropout could not differ between tensor-parallel ranks: it is always 0."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = _always(torch.get_rng_state)  # pyright: ignore[reportPrivateUsage]
    random._set_cuda_rng_state = _always(None)  # pyright: ignore[reportPrivateUsage]
