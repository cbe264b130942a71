"""Normalisation and rotary embedding as transformers computes them, compiled to one kernel each on an accelerator."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sluice.train.compiled import over_tokens


def root_mean_square(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in float32 up to the weight (Zhang and Sennrich, 2019)."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(states.dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of the first features of each head; the others stay.

    Args:
        states: `[tokens, heads, head_dim]`.
        cos, sin: of the angles, `[tokens, 1, rotary_dim]`, in the dtype of `states`.
        interleaved: a pair is two neighbours, as in GLM-4, rather than feature i and i + rotary_dim / 2.
    """
    turned, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    if interleaved:
        across = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        across = torch.cat((-second, first), dim=-1)
    turned = turned * cos + across * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and of keys."""
    return rotate(query, cos, sin, interleaved), rotate(key, cos, sin, interleaved)


@cache
def kernels(compiled: bool) -> tuple[Any, Any]:
    """`root_mean_square` and `rotate_both`, compiled or as they are."""
    if not compiled:
        return root_mean_square, rotate_both
    return over_tokens(root_mean_square), over_tokens(rotate_both)


class Norm(torch.nn.Module):
    """RMSNorm that may stand in a region of sequence parallelism, which megatron-core's own without TE may not.

    Takes the arguments that megatron-core builds norms with.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        marked: Any = self.weight
        marked.sequence_parallel = config.sequence_parallel  # its gradient is summed over the ranks of a sequence
        self._eps = eps
        self._compute = kernels(config.compile_small)[0]

    def forward(self, states: Tensor) -> Tensor:
        return self._compute(states, self.weight, self._eps)
