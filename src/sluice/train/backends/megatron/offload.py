"""Memory of a model and its optimizer that leaves the accelerator, by storages: views of them keep what they know.

megatron-core lays parameters and gradients into large buffers. A tensor's own `data` cannot be moved then; what can is
the storage under all views of it, which is emptied and filled again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sluice import device as devices


class HostStorages:
    """Moves storages out and back.

    The host's side is pinned, allocated when a storage first leaves, and kept: a later switch only copies.

    Args:
        device: where the storages live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[int, Tensor] = {}
        self._away: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []

    @property
    def away(self) -> bool:
        """Whether storages are out."""
        return bool(self._away)

    @torch.no_grad()
    def take(self, tensors: Iterable[Tensor], scratch: Iterable[Tensor] = ()) -> None:
        """Empty the storages of `tensors`, whose bytes go to host memory, and of `scratch`, whose bytes are lost.

        Harmless when repeated.
        """
        if self._away:
            return
        seen: set[int] = set()
        for tensor, keeps in (*((each, True) for each in tensors), *((each, False) for each in scratch)):
            storage = tensor.untyped_storage()
            if tensor.device.type != self._device.type or storage._cdata in seen or not storage.nbytes():
                continue
            seen.add(storage._cdata)
            self._away.append((storage, storage.nbytes(), self._copy(storage) if keeps else None))
        devices.synchronize(self._device)
        for storage, _, _ in self._away:
            storage.resize_(0)
        devices.free_cached(self._device)

    @torch.no_grad()
    def give_back(self) -> None:
        """Fill them again; scratch memory is zeros."""
        for storage, size, copy in self._away:
            storage.resize_(size)
            there = _bytes(storage)
            there.zero_() if copy is None else there.copy_(copy, non_blocking=True)
        devices.synchronize(self._device)
        self._away.clear()

    def there(self, tensor: Tensor) -> Tensor:
        """`tensor` as it is, or for as long as it is away a copy on the device."""
        for storage, _, copy in self._away:
            if storage._cdata == tensor.untyped_storage()._cdata and copy is not None:
                flat = copy.view(tensor.dtype)
                return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).to(self._device)
        return tensor

    def _copy(self, storage: torch.UntypedStorage) -> Tensor:
        kept = self._kept.get(storage._cdata)
        if kept is None or kept.numel() != storage.nbytes():
            pinned = self._device.type != "cpu"
            kept = self._kept[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        return kept.copy_(_bytes(storage), non_blocking=True)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
