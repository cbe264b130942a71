"""The rotary embedding of a model, by transformers' own class: every kind of scaling is its own."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PretrainedConfig


class Angles:
    """Cosine and sine by position.

    Args:
        config: of the model; its class names the module of transformers that has the embedding.
        interleaved: see `norm.rotate`.
        dtype: in which the model computes.
    """

    def __init__(
        self, config: PretrainedConfig, device: torch.device, *, interleaved: bool, dtype: torch.dtype
    ) -> None:
        model: Any = MODEL_MAPPING[type(config)]
        kind = getattr(sys.modules[model.__module__], f"{model.__name__.removesuffix('Model')}RotaryEmbedding")
        self._rotary: torch.nn.Module = kind(config=config).to(device)
        self._interleaved = interleaved
        self._dtype = dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """At `positions` `[n]`: `[n, 1, rotary_dim]` each."""
        like = torch.empty(0, dtype=self._dtype, device=positions.device)
        cos, sin = self._rotary(like, positions.unsqueeze(0))
        return self._shape(cos[0]), self._shape(sin[0])

    def _shape(self, values: Tensor) -> Tensor:
        if self._interleaved:
            values = values[:, : values.shape[1] // 2].repeat_interleave(2, dim=1)
        return values.unsqueeze(1)
