"""Weights that reach an embedded server over HTTP: tensors in shared memory, or a folder."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sluice.errors import WeightsError
from sluice.types import Version
from sluice.weights.base import Manifest
from sluice.weights.store import tensor_info

_ALLOWED = {
    "torch": {"Tensor", "Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "bool"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch.nn.parameter": {"Parameter"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch.multiprocessing.reductions": {"rebuild_tensor", "rebuild_storage_filename", "rebuild_typed_storage"},
    "collections": {"OrderedDict"},
}
"""What a pickle of named CPU tensors names. Anything else could run code."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise WeightsError(
                f"a bucket of weights names {module}.{name}, which no tensor in shared memory needs",
                hint="an embedded server takes CPU tensors only, as rollout.sglang.sync = 'tensor' sends them",
            )
        return super().find_class(module, name)


def read_bucket(text: str) -> list[tuple[str, Tensor]]:
    """Named tensors as `serialise` of the SGLang client wrote them; they lie in memory that the sender shares.

    Raises:
        WeightsError: the text is no such bucket, or its memory is gone.
    """
    try:
        named: Any = _Unpickler(io.BytesIO(base64.b64decode(text, validate=True))).load()
        return [(str(name), tensor) for name, tensor in named]
    except WeightsError:
        raise
    except (ValueError, TypeError, EOFError, RuntimeError, OSError, AttributeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"a bucket of weights cannot be read: {error}") from error


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files.

    Raises:
        WeightsError: there are none, or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} holds no safetensors files", hint="the folder must be readable at the server")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(f"{file} cannot be read: {error}") from error
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """A version that arrived whole, in the form that `EmbeddedEngine.apply` takes."""

    manifest: Manifest
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, version: Version, weights: Mapping[str, Tensor]) -> Received:
        """`version` as this server counts; digests are those of what arrived."""
        infos = {name: tensor_info(tensor) for name, tensor in weights.items()}
        size = sum(tensor.nbytes for tensor in weights.values())
        return cls(Manifest(version, None, "", infos, size), weights)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()

    def folder(self) -> Path:
        raise WeightsError("what a server received lies in no folder")

    def hold(self) -> None:
        """It is held by whoever refers to it."""

    def release(self) -> None:
        """See `hold`."""
