"""Weights between a Hugging Face folder and the parts of tensor-parallel ranks, a parameter at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sluice.errors import TrainError
from sluice.models.honest import blame, check_tied, weight_files
from sluice.train.backends.megatron.families import Architecture, Parameter

_FLOATS = ("F32", "F16", "BF16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BUFFERS = ("rotary_emb.inv_freq",)
"""Ends of names of what older checkpoints hold besides weights: it is computed."""
_OTHER = "config.json and the safetensors files are of different models: copy both from the same place"
_DAMAGED = "copy the safetensors files of the model anew"


class Reader:
    """The weights of a folder, checked as a whole by their headers, then read in the parts that a rank holds.

    Files stay open (mapped into memory) until `close`; it is a context manager.

    Args:
        path: folder with safetensors files.
        architecture: what they must hold: every tensor of it, in its shape, and nothing else. A head beside a tied
            embedding is allowed when both are equal.

    Raises:
        TrainError: a tensor is missing, unknown, of another shape, or holds no floating-point numbers; names it, its
            file, and the shape it must have. Or a file is missing or damaged.
    """

    def __init__(self, path: Path, architecture: Architecture) -> None:
        self._opened = ExitStack()
        self._slices: dict[str, Any] = {}
        try:
            self._open(path, architecture)
        except BaseException:
            self.close()
            raise

    def part(self, parameter: Parameter, rank: int, size: int, *, dtype: torch.dtype | None = None) -> Tensor:
        """What tensor-parallel rank `rank` of `size` holds of `parameter`, on the CPU; nothing else is read.

        Args:
            dtype: of the result; None is that of the file.

        Raises:
            TrainError: the file cannot be read.
        """
        slices = [self._slices[name] for name in parameter.tensors]
        try:
            return parameter.split.part(slices, rank, size).to(dtype)
        except (OSError, SafetensorError) as error:
            raise TrainError(f"{', '.join(parameter.tensors)} cannot be read: {error}", hint=_DAMAGED) from error

    def close(self) -> None:
        """Let go of the files."""
        self._slices.clear()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: Path, architecture: Architecture) -> None:
        files = weight_files(path)
        expected = {
            name: shape
            for parameter in architecture.parameters
            for name, shape in zip(parameter.tensors, parameter.shapes, strict=True)
        }
        if architecture.tied:
            expected[_HEAD] = expected[_EMBEDDING]
        for file in sorted(set(files.values())):
            for name, found in self._headers(file).items():
                _check_tensor(name, found, file, expected.get(name), architecture)
                self._slices[name] = found
        if architecture.tied:
            expected.pop(_HEAD)
            check_tied(path, _HEAD, _EMBEDDING, files)
        absent = {name: shape for name, shape in expected.items() if name not in self._slices}
        if absent:
            name, shape = next(iter(absent.items()))
            raise TrainError(
                f"the weights in {path} lack {len(absent)} tensors that config.json asks for, first {name} "
                f"{list(shape)}{f', which the index says is in {files[name].name}' if name in files else ''}",
                hint="if the model's head is its embedding, config.json must say tie_word_embeddings = true"
                if list(absent) == [_HEAD]
                else "copy all safetensors shards of the model into the folder, with their config.json",
            )

    def _headers(self, file: Path) -> dict[str, Any]:
        try:
            opened: Any = self._opened.enter_context(safe_open(file, framework="pt"))
            names: list[str] = opened.keys()
            return {name: opened.get_slice(name) for name in names if not name.endswith(_BUFFERS)}
        except (OSError, SafetensorError) as error:
            raise TrainError(f"{file} cannot be read: {error}", hint=_DAMAGED) from error


def whole_tensors(
    parameters: Iterable[Parameter], ranks: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint from the parts of all tensor-parallel ranks, as `named` yields them.

    Args:
        parameters: which to yield, in order.
        ranks: for each rank its parts by Megatron's name.
    """
    return named((each, each.split.whole([parts[each.name] for parts in ranks])) for each in parameters)


def named(wholes: Iterable[tuple[Parameter, Sequence[Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of a checkpoint, in the order of `wholes` and of each parameter's own tensors.

    Raises:
        TrainError: a tensor has another shape than the checkpoint's.
    """
    for parameter, tensors in wholes:
        for name, shape, tensor in zip(parameter.tensors, parameter.shapes, tensors, strict=True):
            if tuple(tensor.shape) != shape:
                raise TrainError(
                    f"{parameter.name} makes {name} {list(tensor.shape)}, but the model's is {list(shape)}",
                    hint="this is a defect of the Megatron backend: please report it with the config.json",
                )
            yield name, tensor


def _check_tensor(
    name: str, found: Any, file: Path, expected: tuple[int, ...] | None, architecture: Architecture
) -> None:
    shape = tuple(found.get_shape())
    if expected is None:
        raise TrainError(f"config.json does not know {name} {list(shape)} in {file}", hint=_OTHER)
    if shape != expected:
        raise TrainError(
            f"{name} in {file} is {list(shape)}, but config.json makes it {list(expected)}"
            f"{blame(architecture.config, expected, shape)}",
            hint=_OTHER,
        )
    if found.get_dtype() not in _FLOATS:
        raise TrainError(
            f"{name} in {file} holds {found.get_dtype()} numbers: the Megatron backend reads {', '.join(_FLOATS)}",
            hint="convert the model to bfloat16 first: quantized weights cannot be trained",
        )
