"""Low-rank adapters by `peft`, inside the model that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sluice.config.lora import LoraConfig
from sluice.errors import CheckpointError, ConfigError, TrainError

_NAME = "policy"
_INSIDE = ".base_layer."


class Adapters:
    """Puts adapters into `model`; from then on only they have a gradient.

    A starts at random (torch's generator) and B at zero, so the model is at first what it was. Adapters are float32.

    Raises:
        ConfigError: `peft` is not installed, or no layer has one of the names.
        TrainError: a named layer cannot have an adapter, or the model's experts would be left out unnoticed.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig) -> None:
        try:
            import peft
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise ConfigError(
                f"train.lora needs peft: {error}", hint="install it: pip install 'sluice-rl[lora]'"
            ) from error
        self._model = model
        names = _targets(model, config)
        settings = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=names, bias="none"  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        peft.inject_adapter_in_model(settings, model, adapter_name=_NAME)
        model.eval()  # what was put in is in training mode
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every adapter, by their name in the model."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block the model is what it was before it had adapters. Forward passes only."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The whole model with its adapters added to the weights, under the names it had before them."""
        for name, tensor in self._model.state_dict().items():
            layer, inside, kind = name.rpartition(_INSIDE)
            if inside and layer in self._layers:
                adapted = self._layers[layer].get_delta_weight(_NAME) if kind == "weight" else None
                yield f"{layer}.{kind}", tensor if adapted is None else tensor + adapted
            elif not any(f".{part}.{_NAME}." in name for part in ("lora_A", "lora_B")):
                yield name, tensor

    def check(self, saved: Mapping[str, Tensor], folder: Path) -> None:
        """Raise CheckpointError unless the base with these adapters is what a checkpoint's `folder` holds."""
        for name, tensor in self.merged():
            if name not in saved or not torch.allclose(saved[name].to(tensor.device), tensor, rtol=1e-3, atol=1e-4):
                raise CheckpointError(
                    f"{name} in {folder} is not that of the run's first model with the adapters of the checkpoint",
                    hint="resume with the model the run was started with, or start a new run",
                )


def _targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Full names of the layers that get an adapter."""
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    usable = [name for name, module in linear.items() if module is not head]
    if not config.target_modules:
        stacked = [name for name, p in model.named_parameters() if p.ndim == 3]
        if stacked:
            raise TrainError(
                f"train.lora: experts of {type(model).__name__} are one stack of matrices, {stacked[0]}, and would get "
                "no adapter",
                hint="name the layers to train without them, such as train.lora.target_modules = ['q_proj', 'v_proj']",
            )
        return usable
    found: list[str] = []
    for wanted in config.target_modules:
        matching = [name for name in usable if name == wanted or name.endswith(f".{wanted}")]
        if not matching:
            named = sorted({name.rpartition(".")[2] for name in usable})
            raise ConfigError(
                f"train.lora.target_modules: {type(model).__name__} has no linear layer {wanted!r} besides its head",
                hint=f"there are: {', '.join(named)}",
            )
        found += matching
    return list(dict.fromkeys(found))
