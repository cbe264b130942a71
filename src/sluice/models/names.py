"""Weights under the names and shapes of a Hugging Face checkpoint, whatever layout the module keeps them in.

A transformers module may hold them otherwise: the experts of a mixture are one tensor there and many in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sluice.errors import WeightsError


def module_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint must hold, by its name in the module: parameters and saved buffers, tied ones once."""
    weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    saved = model.state_dict(keep_vars=True)
    weights.update({name: buffer for name, buffer in model.named_buffers() if name in saved})
    return weights


def checkpoint_views(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Every tensor of a checkpoint as a view of the module's memory: what is copied into one changes the model.

    Raises:
        WeightsError: a tensor of the checkpoint is no part of one of the module's.
    """
    own = module_weights(model)
    with _NoCopies():
        views: dict[str, Tensor] = dict(revert_weight_conversion(model, own))
    memory = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
    for name, view in views.items():
        if view.untyped_storage().data_ptr() not in memory:
            raise WeightsError(
                f"{name} of {type(model).__name__} is computed when a checkpoint is read, so it cannot be replaced in "
                "a model that is loaded",
                hint="use an SGLang engine for this model",
            )
    return views


class _NoCopies(TorchFunctionMode):
    """A part of a tensor stays a view of it where transformers would make it contiguous."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))
