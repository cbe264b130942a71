"""The output head of a causal language model, taken apart so that logits can be made a chunk at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sluice.errors import TrainError


class Head(NamedTuple):
    """logits = scale · (hidden · weightᵀ + bias). `weight` is `[vocabulary, hidden size]`, `bias` `[vocabulary]`."""

    weight: Tensor
    bias: Tensor | None
    scale: float


def output_head(model: PreTrainedModel) -> Head:
    """The linear head of `model` with the scale that its config names (Cohere, Granite).

    Whether logits are really nothing else is for the caller to probe.

    Raises:
        TrainError: the head is not a linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise TrainError(
            f"the output head of {type(model).__name__} is {type(head).__name__}, not a linear layer",
            hint="this model family is not supported by the torch trainer",
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(head.weight, head.bias, scale)


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The part of `model` that makes hidden states.

    Raises:
        TrainError: `model` does not name it.
    """
    base = model.base_model
    if base is model:
        raise TrainError(
            f"{type(model).__name__} has no separate backbone, so its hidden states cannot be had",
            hint="this model family is not supported by the torch trainer",
        )
    return base
