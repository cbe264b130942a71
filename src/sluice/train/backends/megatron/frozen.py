"""Policies that are scored and never trained: copies of their weights in host memory, put in the model's place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sluice.train.backends.megatron.families import Architecture
from sluice.train.backends.megatron.folder import Reader
from sluice.train.backends.megatron.owned import Own


class FrozenWeights:
    """By the stream that each fills; read when a stream is first asked for, and kept.

    Args:
        folders: Hugging Face folder of each stream.
        described: the policy's architecture, which all of them have, see `admitted`.
        parameters: this rank's, which the weights are put into.
        place: this tensor-parallel rank and how many there are.
    """

    def __init__(
        self, folders: Mapping[str, Path], described: Architecture, parameters: Sequence[Own], place: tuple[int, int]
    ) -> None:
        self._folders = dict(folders)
        self._described = described
        self._parameters = list(parameters)
        self._place = place
        self._copies: dict[str, list[Tensor]] = {}
        self._backup: list[Tensor] = []

    @property
    def streams(self) -> frozenset[str]:
        return frozenset(self._folders)

    @contextmanager
    def in_place(self, stream: str) -> Iterator[None]:
        """The model is the policy that fills `stream` for the length of the block, and as it was afterwards."""
        copies = self._copies.setdefault(stream, []) or self._read(stream)
        parts = [own.part.data for own in self._parameters]
        self._backup = self._backup or [_host(part) for part in parts]
        for part, kept in zip(parts, self._backup, strict=True):
            kept.copy_(part)
        try:
            for part, copy in zip(parts, copies, strict=True):
                part.copy_(copy)
            yield
        finally:
            for part, kept in zip(parts, self._backup, strict=True):
                part.copy_(kept)

    def _read(self, stream: str) -> list[Tensor]:
        with Reader(self._folders[stream], self._described) as reader:
            for own in self._parameters:
                copy = _host(own.part.data)
                copy.copy_(reader.part(own.described, *self._place))
                self._copies[stream].append(copy)
        return self._copies[stream]


def _host(part: Tensor) -> Tensor:
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
