"""What both sides are told, and how both measure. The standard library only: TRL's side imports it."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTUP, SNAPSHOT = "startup", "snapshot"
"""Phases that are no part of an update: before the first one, and writing a model for the evaluation afterwards."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of one side.

    Attributes:
        started: Unix time at which the process was asked for.
        model: Hugging Face folder of the first weights, with tokenizer and chat template.
        prompts: JSON lines with `question` and `answer`, in the order of training.
        out: folder for snapshots.
        updates: optimizer steps; each trains `groups` prompts with `samples` answers each.
        reward: `file.py:name` of a function (text, truth) → float.
        lr, betas, eps, weight_decay, clip_grad, warmup, final_lr_ratio: of AdamW and its linear schedule.
        clip, advantage_eps: of GRPO: range of the ratio, and what is added to a group's standard deviation.
        snapshot_every: updates between two snapshots.
        device, dtype: `cpu` and `float32`, or `cuda` and `bfloat16`.
        engine: which engine samples on Sluice's side: `embedded`, or `sglang` as the recipe for a GPU host has it.
        micro_batch: answers in one forward and backward pass on TRL's side; Sluice counts tokens instead.
    """

    started: float
    model: str
    prompts: str
    out: str
    seed: int
    updates: int
    groups: int
    samples: int
    max_new_tokens: int
    reward: str
    lr: float
    warmup: int
    final_lr_ratio: float
    snapshot_every: int
    threads: int
    temperature: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    clip: float = 0.2
    advantage_eps: float = 1e-4
    device: str = "cpu"
    dtype: str = "float32"
    engine: str = "embedded"
    micro_batch: int = 256

    def write(self, file: Path) -> Path:
        file.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")
        return file

    @classmethod
    def read(cls, file: str) -> Settings:
        return cls(**json.loads(Path(file).read_text(encoding="utf-8")))

    def rate(self, update: int) -> float:
        """Learning rate of update `update`, counted from 0: `sluice.train.schedule.learning_rate`, linear."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        progress = min((update - self.warmup) / max(self.updates - 1 - self.warmup, 1), 1.0)
        return self.lr * (1.0 - (1.0 - self.final_lr_ratio) * progress)


class Clock:
    """Wall and CPU seconds of this process by phase; exactly one phase at a time.

    Args:
        started: Unix time at which the process was asked for: start-up counts from there.
    """

    def __init__(self, started: float) -> None:
        self._now = STARTUP
        self._wall, self._cpu = time.perf_counter() - (time.time() - started), 0.0
        self._spent: dict[str, list[float]] = {}
        self._updates: list[list[float]] = []
        self.sampled_tokens = 0
        self.trained_tokens = 0

    def enter(self, phase: str) -> str:
        """Another phase begins; returns the one that ends."""
        wall, cpu = time.perf_counter(), time.process_time()
        spent = self._spent.setdefault(self._now, [0.0, 0.0])
        spent[0] += wall - self._wall
        spent[1] += cpu - self._cpu
        before, self._now, self._wall, self._cpu = self._now, phase, wall, cpu
        return before

    def update_done(self) -> None:
        """An optimizer step is over, its weights in use."""
        self.enter(self._now)
        counted = [spent for phase, spent in self._spent.items() if phase not in (STARTUP, SNAPSHOT)]
        self._updates.append([round(sum(spent[at] for spent in counted), 4) for at in (0, 1)])

    def result(self, **more: Any) -> dict[str, Any]:
        """Everything, as JSON. `updates` are seconds since the first update began, snapshots left out: [wall, CPU]."""
        self.enter(self._now)
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "phases": {phase: {"wall": round(w, 3), "cpu": round(c, 3)} for phase, (w, c) in self._spent.items()},
            "updates": self._updates,
            "sampled_tokens": self.sampled_tokens,
            "trained_tokens": self.trained_tokens,
            "peak_rss_mib": round(own.ru_maxrss / 1024),
            "children_peak_rss_mib": round(children.ru_maxrss / 1024),
            **more,
        }
