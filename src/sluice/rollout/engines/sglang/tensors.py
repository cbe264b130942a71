"""Named tensors for a server on the same machine: in buckets, through shared memory or as CUDA IPC handles."""

from __future__ import annotations

import atexit
import base64
import io
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from sluice import device as devices
from sluice.errors import WeightsError
from sluice.weights.base import Published

_STRATEGY = threading.Lock()
"""Held while torch's sharing strategy is another: servers of a set are served from several threads at a time."""

_SHARED = Path("/dev/shm")


def promised(published: Published) -> Iterator[tuple[str, Tensor]]:
    """The version's tensors, each compared with the manifest first: a wrong shape would end the server.

    Raises:
        WeightsError: a tensor is not as the manifest says, is not in it, or is missing.
    """
    manifest = published.manifest
    missing = dict(manifest.tensors)
    for name, tensor in published.tensors():
        info = missing.pop(name, None)
        here = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if info is None or here != (info.dtype, tuple(info.shape)):
            raise WeightsError(f"{name} of version {manifest.version} is {here}, its manifest says {info}")
        yield name, tensor
    if missing:
        raise WeightsError(f"version {manifest.version} lacks {', '.join(sorted(missing))}")


def bucketed(tensors: Iterable[tuple[str, Tensor]], num_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group named tensors, in order, into lists of at most `num_bytes`; a larger tensor stands alone."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > num_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


class _Pickler(ForkingPickler):
    """Pickles tensors as torch does, but calls an accelerator by its UUID.

    Torch writes down its index, which means another one in a process that sees other accelerators. SGLang's
    reader takes either (0.5.17 and 0.5.21: `sglang.srt.utils.patch_torch`).
    """

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or not obj.is_cuda:
            return NotImplemented
        rebuild, args = reductions.reduce_tensor(obj)
        return rebuild, by_uuid(args)


DEVICE_ARGUMENT = 6
"""Where `torch.multiprocessing.reductions.rebuild_cuda_tensor` takes the device."""


def by_uuid(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of `rebuild_cuda_tensor` with the device's UUID in the place of its index."""
    return *args[:DEVICE_ARGUMENT], devices.uuid(args[DEVICE_ARGUMENT]), *args[DEVICE_ARGUMENT + 1 :]


def serialise(bucket: list[tuple[str, Tensor]], copies: int = 1) -> list[str]:
    """Named tensors as SGLang reads them: base64 of a pickle that refers to their memory.

    CPU tensors are files in shared memory, those of an accelerator IPC handles: valid on the same host while the
    tensors live here, which must be until the server has answered.

    Only torch is needed on this side. The memory of CPU tensors moves to shared memory; it is freed when they are
    gone here and in the reader. Torch's sharing strategy, one per process, is changed for the time of the
    call: with the usual one, passing file descriptors, the reader cannot authenticate and dies.

    The bytes could also travel inside the pickle, to any machine: 256 MB took 49 s that way, 0.6 s this way.

    Args:
        bucket: (name, tensor) pairs.
        copies: how many processes will read; each must get a pickle of its own.
    """
    with _STRATEGY:
        usual = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            texts: list[str] = []
            for _ in range(copies):
                buffer = io.BytesIO()
                _Pickler(buffer).dump(bucket)
                texts.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
            return texts
        finally:
            torch.multiprocessing.set_sharing_strategy(usual)
            atexit.unregister(_end_sharing)  # once, however often we come here
            atexit.register(_end_sharing)


def free_unread() -> None:
    """Remove the shared memory of this process that no process maps: what a server that died never read.

    A tensor that was serialised keeps its file until its reader has opened and dropped it, here gone or not.
    Linux only, as the sharing is.
    """
    with _STRATEGY:  # a file that is being made is not mapped yet
        left = {str(path) for path in _SHARED.glob(f"torch_{os.getpid()}_*")}
        for process in psutil.process_iter() if left else ():
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # it ended, or is another user's and cannot open our files
            left -= {path for path in left if path in maps}
        for path in left:
            Path(path).unlink(missing_ok=True)


def _end_sharing() -> None:
    """Free what is left and end torch's `torch_shm_manager`, which the first shared tensor started as our child.

    It would live as long as the server and hold this process's stdout open: pipes from us would never end.
    Only at exit: torch does not start a second one.
    """
    for child in psutil.Process().children():
        try:
            if child.name() == "torch_shm_manager":
                child.terminate()
        except psutil.NoSuchProcess:
            continue  # it ended by itself
    free_unread()


def is_local(host: str) -> bool:
    """Whether `host` is an address of this machine: only those can be bound."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.bind((address[0], 0))
    except OSError:
        return False
    return True
