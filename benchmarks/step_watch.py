"""What a training step spends its time on: workers of ranks that measure themselves, and kernels by kind."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sluice import device as devices
from sluice.train.backends.megatron.worker import MegatronWorker
from sluice.train.base import Loss
from sluice.train.ranks.spec import RankSpec
from sluice.train.ranks.worker import RankWorker
from sluice.types import LossInputs, LossOutput

KINDS = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter",
    "optimizer": r"adam|multi_tensor|_foreach",
    "attention": r"scaled_dot_product|flash|fmha|sdpa|attention",
    "matmul": r"gemm|cutlass|nvjet|xmma|splitk|aten::(mm|addmm|addmm_|bmm|baddbmm)$",
    "compiled": r"triton",
    "copies": r"copy|memcpy|memset|catarray|aten::cat$|index|gather|scatter|embedding|aten::(fill_|zero_|clone)",
    "elementwise": r"elementwise|reduce|softmax|norm|aten::",
}
"""Kinds of kernels, and of operations on a CPU, by their names; the first that fits."""
_SHOWN = 15


def policy_loss(inputs: LossInputs) -> LossOutput:
    """A clipped policy gradient: -min(ratio · A, clip(ratio, 0.8, 1.2) · A)."""
    advantage = inputs.streams["advantage"].to(inputs.logprobs.dtype)
    ratio = (inputs.logprobs - inputs.streams["proximal"]).exp()
    return LossOutput(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage), {})


class Watch:
    """Seconds by name: CPU seconds of this process on a CPU; on an accelerator wall seconds, which it waits for."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._profile: Any = None

    def _now(self) -> float:
        if self._device == "cpu":
            return time.process_time()
        devices.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def over(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._seconds[name] += self._now() - begin

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed under `name`."""

        @wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.over(name):
                return call(*arguments, **options)

        return timed

    def on(self, optimizer: Any) -> None:
        """Time the norm of the gradients, and clipping and update."""
        optimizer.grad_norm = self.around("grad_norm", optimizer.grad_norm)
        optimizer.update = self.around("update", optimizer.update)

    def take(self) -> dict[str, float]:
        """Seconds since the last time; of a step without norm and update is left `forward_backward`."""
        found, self._seconds = dict(self._seconds), defaultdict(float)
        if "step" in found:
            found["forward_backward"] = found.pop("step") - found["grad_norm"] - found["update"]
        return found

    def reset_peak(self) -> None:
        """Count the peak of memory from here on; on a CPU there is no such thing."""
        if self._device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def profile(self) -> None:
        """Begin to record kernels."""
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device != "cpu" else [])
        self._profile = profile(activities=kinds)
        self._profile.__enter__()

    def profiled(self) -> dict[str, Any]:
        """What was recorded since; see `by_kind`."""
        devices.synchronize(self._device)
        self._profile.__exit__(None, None, None)
        wanted = DeviceType.CPU if self._device == "cpu" else DeviceType.CUDA
        microseconds: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in self._profile.events():
            if event.device_type == wanted and not event.is_user_annotation:
                on_cpu = wanted == DeviceType.CPU
                microseconds[event.name] += event.self_cpu_time_total if on_cpu else event.time_range.elapsed_us()
                calls[event.name] += 1
        self._profile = None
        return by_kind(microseconds, calls)


def by_kind(microseconds: Counter[str], calls: Counter[str]) -> dict[str, Any]:
    """Seconds and calls by kind, and of the names with the most of them.

    Args:
        microseconds, calls: by name of the kernel, or of the operation on a CPU.
    """
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, spent in microseconds.items():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE)), "other")
        seconds[kind] += spent / 1e6  # pyright: ignore[reportArgumentType]
        counts[kind] += calls[name]
    return {
        "seconds": {kind: round(spent, 5) for kind, spent in seconds.most_common()},
        "calls": {kind: counts[kind] for kind, _ in seconds.most_common()},
        "top": [
            {"name": name[:120], "seconds": round(spent / 1e6, 5), "calls": calls[name]}
            for name, spent in microseconds.most_common(_SHOWN)
        ],
    }


class _Watched:
    """What a worker that measures itself has besides its own methods; it comes before the worker's class."""

    watch: Watch

    def score(self, streams: Sequence[str], passes: Sequence[Any]) -> dict[str, Any]:
        with self.watch.over("score"):
            return super().score(streams, passes)  # pyright: ignore[reportAttributeAccessIssue]

    def step(self, micros: Sequence[Any], loss: Loss, streams: frozenset[str]) -> Any:
        with self.watch.over("step"):
            return super().step(micros, loss, streams)  # pyright: ignore[reportAttributeAccessIssue]

    def take(self) -> dict[str, float]:
        return self.watch.take()

    def reset_peak(self) -> None:
        self.watch.reset_peak()

    def memory(self) -> int:
        """Bytes of the accelerator that this rank's tensors have; 0 on a CPU."""
        return torch.cuda.memory_allocated()

    def profile(self) -> None:
        self.watch.profile()

    def profiled(self) -> dict[str, Any]:
        return self.watch.profiled()


class WatchedTorch(_Watched, RankWorker):
    """A rank of the torch trainer that measures itself."""

    def __init__(self, spec: RankSpec) -> None:
        super().__init__(spec)
        self.watch = Watch(spec.device)
        self.watch.on(self._trainer.optimizer)


class WatchedMegatron(_Watched, MegatronWorker):
    """The same of the Megatron trainer."""

    def __init__(self, spec: RankSpec) -> None:
        super().__init__(spec)
        self.watch = Watch(spec.device)
        self.watch.on(self._trainer.model.optimizer)
