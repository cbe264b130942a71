"""Lets megatron-core run on a CPU over gloo. Nothing here is active where there is a GPU.

megatron-core has no device switch: it names CUDA in the ways that are answered below. All of it is global to the
process, which must be a rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class Part(StrEnum):
    """What is answered in CUDA's place. A test leaves out each in turn, and says when it can go."""

    CURRENT_DEVICE = "torch.cuda.current_device"
    SYNCHRONIZE = "torch.cuda.synchronize"
    RANDOM_STATE = "torch.cuda.get_rng_state"
    LITERAL = "device='cuda'"
    MOVE = "Tensor.cuda"
    TYPE = "Tensor.type"
    """Optimizers compare names of types, such as `torch.cuda.FloatTensor`."""
    STATE_BEFORE = "random._get_cuda_rng_state"
    STATE_AFTER = "random._set_cuda_rng_state"
    """torch would keep each call until there is CUDA."""


class _CudaMeansCpu(TorchFunctionMode):
    """Calls on tensors, and calls that make them."""

    def __init__(self, parts: Collection[Part]) -> None:
        super().__init__()
        self._parts = parts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda and Part.MOVE in self._parts:
            return args[0]
        if func is torch.Tensor.type and Part.TYPE in self._parts and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if Part.LITERAL in self._parts and str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        return func(*args, **kwargs)


def install(*, without: Collection[Part] = ()) -> None:
    """Call before anything of megatron-core is made. Harmless when repeated, and where there is a GPU.

    Args:
        without: what stays as it is, for tests.
    """
    if torch.cuda.is_available() or getattr(torch.cuda, "_sluice_shim", False):
        return
    torch.cuda._sluice_shim = True  # pyright: ignore[reportAttributeAccessIssue]
    from megatron.core.tensor_parallel import random

    # There is one generator on a CPU, so dropout could not differ between tensor-parallel ranks: it is always 0.
    answers: dict[Part, tuple[Any, Callable[..., Any]]] = {
        Part.CURRENT_DEVICE: (torch.cuda, lambda: _CPU),
        Part.SYNCHRONIZE: (torch.cuda, lambda *_: None),
        Part.RANDOM_STATE: (torch.cuda, lambda *_: torch.get_rng_state()),
        Part.STATE_BEFORE: (random, lambda *_, **__: torch.get_rng_state()),
        Part.STATE_AFTER: (random, lambda *_, **__: None),
    }
    for part, (module, answer) in answers.items():
        if part not in without:
            setattr(module, part.rpartition(".")[2], answer)
    _CudaMeansCpu(frozenset(Part) - frozenset(without)).__enter__()
