"""A trainer's tensors between their accelerator and host memory, for as long as somebody else has the accelerator."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sluice import device as devices


class HostMemory:
    """Moves tensors out and back. Each stays the same object, so parameters, hooks and optimizer keep what they know.

    The host's side is pinned, allocated when a tensor first leaves, and kept: a later switch only copies.

    Args:
        device: where the tensors live otherwise. On a CPU nothing ever moves.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by identity of the tensor, which is held

    @torch.no_grad()
    def take(self, tensors: Iterable[Tensor]) -> None:
        """Move to host memory what is on the device, and free it there."""
        leaving = [tensor for tensor in tensors if tensor.device.type != "cpu"]
        kept, self._buffers = self._buffers, {}
        for tensor in leaving:
            _, buffer = kept.get(id(tensor), (tensor, None))
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=True)
            buffer.copy_(tensor, non_blocking=True)
            self._buffers[id(tensor)] = tensor, buffer
        devices.synchronize(self._device)
        for tensor in leaving:
            tensor.data = self._buffers[id(tensor)][1]
        devices.free_cached(self._device)

    @torch.no_grad()
    def give_back(self, tensors: Iterable[Tensor]) -> None:
        """Move to the device what is in host memory."""
        if self._device.type == "cpu":
            return
        for tensor in tensors:
            if tensor.device.type == "cpu":
                tensor.data = tensor.to(self._device, non_blocking=True)
        devices.synchronize(self._device)
