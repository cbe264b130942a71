"""A model's weights, as ranks write them for the controller: each a part, in a file of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sluice.errors import TrainError

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Sizes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of every tensor."""


def sizes_of(tensors: Mapping[str, Tensor]) -> Sizes:
    """Of tensors that are there."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_weights(file: Path, sizes: Sizes, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A safetensors file (https://github.com/huggingface/safetensors#format), written a tensor at a time: host memory
    holds one of them, where the library wants all.

    Args:
        sizes: of all tensors.
        tensors: these, on any device, in any order.
    """
    header: dict[str, dict[str, object]] = {}
    begins: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in sorted(sizes.items(), key=lambda item: -item[1][0].itemsize):  # so that all are aligned
        begins[name], end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begins[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == sizes[name], name
            out.seek(8 + len(text) + begins.pop(name))
            out.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    assert not begins, f"{file}: {sorted(begins)} did not come"


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the safetensors files in `folder`, file after file in the order of their names.

    Raises:
        TrainError: before anything is read: no rank wrote anything, or two files hold a tensor of one name.
    """
    files = sorted(folder.glob("*.safetensors"))
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        names = [list(tensors.keys()) for tensors in opened]
        counts = Counter(name for found in names for name in found)
        if not counts:
            raise TrainError("no rank wrote weights", hint="the ranks' output is in the run's folder under ranks/")
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            writers = " and ".join(file.name for file, found in zip(files, names, strict=True) if twice[0] in found)
            others = f", and {len(twice) - 1} further tensors" if len(twice) > 1 else ""
            raise TrainError(
                f"ranks wrote {twice[0]!r} more than once, in {writers}{others}: nobody knows which is right",
                hint="this is a fault of the trainer's backend; nothing was published. Please report it with the "
                "recipe's train table",
            )
        for tensors, found in zip(opened, names, strict=True):
            for name in found:
                yield name, tensors.get_tensor(name)
