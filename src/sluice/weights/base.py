"""Published weights and the two sides that meet in them: a Source that yields, a Sink that applies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sluice.types import Version


class Source(Protocol):
    """A trainer's side: its parameters under Hugging Face checkpoint names."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, tied ones only under their first name. The caller must not keep references."""
        ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a manifest: torch dtype name, shape, and the xxh3-128 of its bytes in hex."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """An immutable, checksummed version of the weights. `checksum` covers names, dtypes, shapes and bytes."""

    version: Version
    parent: Version | None
    checksum: str
    tensors: dict[str, TensorInfo]
    num_bytes: int


class Published(Protocol):
    """A published version: its manifest and ways to read it.

    Readable for as long as somebody holds it. The store holds the newest; an engine that may have to give it to
    a server again later holds it too.
    """

    @property
    def manifest(self) -> Manifest: ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Contiguous CPU tensors, verified against the manifest when they were written."""
        ...

    def folder(self) -> Path:
        """A folder that holds the weights as `model.safetensors` with the model's config and tokenizer files."""
        ...

    def hold(self) -> None:
        """Keep it readable until the matching `release`."""
        ...

    def release(self) -> None:
        """Let go; the last one to do so frees it."""
        ...


class Sink(Protocol):
    """An engine's side. `apply` is called while the engine is paused or, if the engine allows, serving."""

    @property
    def name(self) -> str: ...

    async def apply(self, published: Published) -> None:
        """Swap in the whole version, or raise.

        After a raise the engine must serve nothing (it raises `Unroutable`) until a later `apply` succeeds.
        """
        ...
