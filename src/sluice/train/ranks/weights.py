"""A model's weights, as ranks wrote them for the controller: each a part, in a file of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from sluice.errors import TrainError


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
