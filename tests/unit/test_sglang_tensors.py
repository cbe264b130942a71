"""Serialising tensors for several servers at a time."""

from __future__ import annotations

import base64
import threading

import torch

from sluice.rollout.engines.sglang.tensors import serialise


def test_threads_do_not_change_each_others_sharing_strategy() -> None:
    """A reader of another process can open files in shared memory; with file descriptors it would need our key."""
    start = threading.Barrier(8)
    wrong: list[str] = []

    def one(number: int) -> None:
        start.wait(10)
        for _ in range(20):
            bucket = [(f"w{n}", torch.full((4,), float(number))) for n in range(20)]
            pickled = base64.b64decode(serialise(bucket)[0])
            if b"rebuild_storage_fd" in pickled or b"rebuild_storage_filename" not in pickled:
                wrong.append(f"thread {number}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"
