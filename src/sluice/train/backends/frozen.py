"""Policies that are scored and never trained: the reference and the teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sluice.config.train import TrainConfig
from sluice.models.build import load_model, to_device
from sluice.train.attention import PACKED_ATTENTION
from sluice.train.packed_model import PackedModel, choose_attention
from sluice.train.sharding import Shards


class FrozenPolicies:
    """Models by the stream that they fill, each read when it is first asked for and kept.

    Args:
        folders: Hugging Face folder of each stream.
        config: precision and chunk of the forward pass.
        device: where they live.
        shards: divides each among the ranks; None where there is one.
    """

    def __init__(
        self, folders: Mapping[str, Path], config: TrainConfig, device: torch.device, shards: Shards | None = None
    ) -> None:
        self._shards = shards
        self._folders = dict(folders)
        self._config = config
        self._device = device
        self._models: dict[str, PackedModel] = {}

    @property
    def streams(self) -> frozenset[str]:
        """The streams that these models fill."""
        return frozenset(self._folders)

    def model(self, stream: str) -> PackedModel:
        """The model that fills `stream`, without gradient.

        Raises:
            ConfigError: its folder is no usable model.
            TrainError: the weights do not fit, or the model family is not supported.
        """
        if stream not in self._models:
            self._models[stream] = self._load(self._folders[stream])
        return self._models[stream]

    def tensors(self) -> Iterator[Tensor]:
        """Of every model that was read."""
        for each in self._models.values():
            yield from (*each.model.parameters(), *each.model.buffers())

    def move(self, device: str) -> None:
        """Models that are sharded to another device."""
        for each in self._models.values():
            each.move(device)

    def _load(self, folder: Path) -> PackedModel:
        config = self._config
        model = load_model(folder, dtype="float32", attn_implementation=PACKED_ATTENTION)
        attention = choose_attention(model, chunk=config.logprob_chunk, longest=config.micro_batch_tokens)
        if config.dtype != "float32":
            model = load_model(folder, dtype=config.dtype, attn_implementation=attention)
        model.requires_grad_(False)
        whole = self._shards.wrap(model) if self._shards else None
        if whole is None:
            model = to_device(model, self._device)
        return PackedModel(model, chunk=config.logprob_chunk, compiled=config.compile, whole=whole)
