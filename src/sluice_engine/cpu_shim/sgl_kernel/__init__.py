"""Stands in for `sglang-kernel`, SGLang's compiled CUDA kernels.

Without it the server ends at start-up with "No module named 'sgl_kernel'", although a dense model on a CPU
calls none of them. Every kernel exists here; calling one raises, so that nothing is computed wrongly.

SGLang imports this package early in each of its processes, which makes it the place for the one call to CUDA
that has no switch. Routed experts, LoRA and prefill/decode separation would need more of this kind.
"""

from __future__ import annotations

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


if not torch.cuda.is_available():
    # /weights_checker fails with "Torch not compiled with CUDA enabled" otherwise; there is nothing to wait for
    torch.cuda.synchronize = lambda device=None: None
