"""A parameter of this rank, and how the whole of it comes together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sluice.train.backends.megatron.division import holders_group, tensor_group
from sluice.train.backends.megatron.families import Parameter
from sluice.train.backends.megatron.folder import named


class Own(NamedTuple):
    """A parameter of this rank.

    Attributes:
        described: what it is in the whole model.
        part: this rank's part of it.
        tied: a last stage's copy of the embedding, which is its head. It is read and updated, and never written.
    """

    described: Parameter
    part: torch.nn.Parameter
    tied: bool

    def whole(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a checkpoint from the parts of all tensor-parallel ranks, on the device of these."""
        for name, tensor in named([(self.described, self.described.split.whole(parts))]):
            yield name, tensor.detach()


def on_host(tensor: Tensor) -> Tensor:
    """In host memory of its own."""
    return tensor.to("cpu", copy=True).contiguous()


def first_replica() -> bool:
    """Whether this rank stands for those that hold the same parts."""
    return holders_group().rank() == 0


def writes() -> bool:
    """Whether this rank has the whole tensors of its stages, of all ranks that take part in gathering them."""
    return first_replica() and tensor_group().rank() == 0


def gathered_parts(part: Tensor) -> list[Tensor]:
    """The parts of all tensor-parallel ranks, at each of them."""
    group = tensor_group()
    if group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
