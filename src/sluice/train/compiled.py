"""Functions over tokens, compiled by `torch.compile` once for any number of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from sluice.errors import TrainError

R = TypeVar("R")

_KERNELS = 64
"""Of one function at most: more than kinds of states, precisions and policies of a process."""


def over_tokens(function: Callable[..., R], backend: Any = "inductor") -> Callable[..., R]:
    """`function` compiled once for all numbers of tokens, the first axis of its tensors but for those of one axis.

    What it is compiled for anew shows in its first argument, a tensor.

    Left to itself the compiler makes a kernel of the first number and another of all numbers, for each kind of states
    and with and without gradients: for a model with norms of queries and keys these are eight, after which it compiles
    no more and what differs is computed as it stands, slowly and without a word. The limit is of a whole process.

    Args:
        backend: as of `torch.compile`.

    Raises:
        TrainError: when called; the compiler does not work here.
    """
    import torch._dynamo as dynamo  # seconds, which who compiles nothing should not wait
    from torch._dynamo.exc import BackendCompilerFailed

    limits: Any = dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _KERNELS)
    compiled = cast(Callable[..., R], torch.compile(function, backend=backend))

    marked: set[Any] = set()

    @wraps(function)
    def call(states: Tensor, *further: Any) -> R:
        kind = (states.shape[1:], states.dtype, states.requires_grad, torch.is_grad_enabled())
        if kind not in marked:  # marking takes longer than the call
            for each in (states, *further):
                if isinstance(each, Tensor) and each.ndim > 1:
                    dynamo.maybe_mark_dynamic(each, 0)
            if len(states) > 1:  # for one token there is a kernel of its own
                marked.add(kind)
        try:
            return compiled(states, *further)
        except BackendCompilerFailed as error:
            raise TrainError(
                f"torch.compile does not work here: {error.inner_exception}",
                hint="install a C compiler and Python's headers, or set train.compile=false, which is slower",
            ) from error

    return call
