"""Serialising tensors: for several servers at a time, and from an accelerator."""

from __future__ import annotations

import base64
import gc
import inspect
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import reductions

from sluice import device
from sluice.rollout.engines.sglang.tensors import DEVICE_ARGUMENT, by_uuid, free_unread, serialise


def shared() -> set[Path]:
    return set(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


def test_threads_do_not_change_each_others_sharing_strategy() -> None:
    """A reader of another process can open files in shared memory; with file descriptors it would need our key."""
    before = shared()
    start = threading.Barrier(8)
    wrong: list[str] = []
    lock = threading.Lock()

    def one(number: int) -> None:
        start.wait(10)
        for _ in range(20):
            bucket = [(f"w{n}", torch.full((4,), float(number))) for n in range(20)]
            pickled = base64.b64decode(serialise(bucket)[0])
            if b"rebuild_storage_fd" in pickled or b"rebuild_storage_filename" not in pickled:
                wrong.append(f"thread {number}")
            with lock:  # a reader frees the memory; unread, it would stay when this process has ended
                pickle.loads(pickled)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"
    gc.collect()
    assert shared() == before


def test_what_nobody_read_is_freed_and_what_somebody_maps_is_not() -> None:
    """A server that was killed in an update has not read; torch would keep a whole bucket in memory for it."""
    before = shared()
    never, once = [("a", torch.ones(8))], [("b", torch.ones(8))]
    serialise(never)
    text, _ = serialise(once, copies=2)
    free_unread()
    assert len(shared() - before) == 2, "both are still held here"
    held = pickle.loads(base64.b64decode(text))
    del never, once
    gc.collect()
    assert len(shared() - before) == 2, "torch waits for the readers"
    free_unread()
    assert len(shared() - before) == 1
    assert held[0][1].sum() == 8
    del held
    gc.collect()
    free_unread()
    assert shared() == before


def test_an_accelerator_is_called_by_its_uuid_and_only_offered_to_servers_that_see_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[DEVICE_ARGUMENT] == "storage_device"
    monkeypatch.setattr(device, "uuid", lambda index: f"GPU-{index}")
    args = tuple(range(len(names)))
    assert by_uuid(args) == (*args[:6], "GPU-6", *args[7:])
    for ours, here, theirs, seen in (
        (None, "cuda:0", None, True),
        (None, "cuda:1", "0", False),
        (None, "cuda:1", "0,1", True),
        ("2,3", "cuda:1", "3", True),
        ("2,3", "cuda:0", "3", False),
        ("2", "cuda:0", None, True),
        (None, "cpu", None, False),
    ):
        if ours is None:
            monkeypatch.delenv(device.VISIBLE, raising=False)
        else:
            monkeypatch.setenv(device.VISIBLE, ours)
        environ = {} if theirs is None else {device.VISIBLE: theirs}
        assert device.is_visible_to(here, environ) is seen, (ours, here, theirs)
