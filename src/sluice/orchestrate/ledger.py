"""What a run will hold in memory, counted before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice import device as devices
from sluice.algos.base import ActorCritic, Algorithm
from sluice.config.run import RunConfig
from sluice.errors import ConfigError
from sluice.orchestrate.holdings import (
    GENERATES,
    TRAINS,
    WIDTH,
    Entry,
    count_parameters,
    megatron_holdings,
    torch_holdings,
)
from sluice.orchestrate.pool import GIB


@dataclass(frozen=True, slots=True)
class Ledger:
    """Entries of the fullest device, and what it has.

    A lower bound: activations, logits and what libraries keep are not counted.

    Attributes:
        snapshot: bytes of host memory that a checkpoint takes while it is written, where the entries are of an
            accelerator; on a CPU it is among them.
        host: bytes of host memory that the trainer's ranks take besides, at all times.
        knobs: keys that make the trainer smaller.
    """

    device: str
    total: int
    entries: Sequence[Entry]
    shared: bool
    snapshot: int = 0
    host: int = 0
    knobs: str = ""

    def peak(self) -> tuple[str, int]:
        """The stage with most in it, and its bytes."""
        sums = {stage: sum(e.size for e in self.entries if stage in e.when) for stage in (GENERATES, TRAINS)}
        stage = max(sums, key=lambda name: sums[name])
        return stage, sums[stage]

    @property
    def waiting(self) -> int:
        """Bytes of host memory that the trainer's state takes while engines generate."""
        return sum(entry.waits for entry in self.entries) if self.shared and self.device != "cpu" else 0

    def lines(self) -> list[str]:
        """As it is printed at the start."""
        rows = [f"memory of {self.device}, {_gib(self.total)}, activations not counted:"]
        for stage in (GENERATES, TRAINS):
            there = [entry for entry in self.entries if stage in entry.when]
            parts = " + ".join(f"{entry.what} {_gib(entry.size)}" for entry in there)
            rows.append(f"  while it {stage}: {_gib(sum(entry.size for entry in there))} = {parts}")
        if self.waiting:
            rows.append(f"  in host memory while it {GENERATES}: {_gib(self.waiting)}")
        if self.host:
            rows.append(f"  in host memory, all ranks together: {_gib(self.host)}")
        if self.snapshot:
            rows.append(f"  in host memory while a checkpoint is written: {_gib(self.snapshot)}")
        return rows

    def refuse_if_too_much(self) -> None:
        """ConfigError when even this much does not fit."""
        stage, most = self.peak()
        if most <= self.total:
            return
        parts = ", ".join(f"{e.what} {_gib(e.size)}" for e in self.entries if stage in e.when)
        hint = "checkpoint.background = false, " if self.device == "cpu" else ""
        hint += f"{self.knobs}, a smaller engine or KV cache"
        raise ConfigError(
            f"{self.device} has {_gib(self.total)}; while it {stage} the run needs {_gib(most)} there: {parts}",
            hint=hint if self.shared else f"placement.colocate = true (engine and trainer take turns); or {hint}",
        )


def ledger(config: RunConfig, algorithm: Algorithm, model: Path, device: str) -> Ledger:
    """Count what the parts of a run hold on the trainer's device, from the headers of the model's files.

    Args:
        model: folder of the first weights.
        device: resolved device of the run.

    Raises:
        ConfigError: the trainer's backend does not build this model, or cannot divide it so.
    """
    both = frozenset({GENERATES, TRAINS})
    shared = config.placement.colocate
    parameters = count_parameters(model)
    training = frozenset({TRAINS}) if shared and device != "cpu" else both  # on a CPU it stays where it is
    policies = [model] * ("reference" in algorithm.requires and config.train.lora is None)
    policies += [teacher.path for teacher in config.teachers]
    if config.train.backend == "megatron":
        trainer = megatron_holdings(
            config.train, model, len(policies), device, training, critic=isinstance(algorithm, ActorCritic)
        )
    else:
        trainer = torch_holdings(config.train, parameters, sum(map(count_parameters, policies)), training)
    entries = list(trainer.entries)
    if isinstance(algorithm, ActorCritic) and config.train.backend == "torch":
        size = parameters * 16
        entries.append(Entry("critic, its gradients and moments", size, training, parameters * 12))
    serving = frozenset({GENERATES}) if shared else both
    entries += _engine(config, model, parameters, device, serving)
    snapshot = _snapshot(config, algorithm, parameters)
    if device == "cpu" and snapshot:
        entries.append(Entry("a checkpoint that is being written", snapshot, both))
    total = devices.total_memory(device)
    return Ledger(device, total, entries, shared, 0 if device == "cpu" else snapshot, trainer.host, trainer.knobs)


def _snapshot(config: RunConfig, algorithm: Algorithm, parameters: int) -> int:
    """Bytes of the copy that a checkpoint is written from: weights, float32 masters, moments; the critic's too."""
    if not config.checkpoint.background:
        return 0
    width = WIDTH[config.train.dtype]
    whole = parameters * (width + 8 + (0 if width == 4 else 4))
    own = parameters * width if config.train.lora is not None else whole  # adapters are not counted
    return own + (whole if isinstance(algorithm, ActorCritic) else 0)


def _engine(config: RunConfig, model: Path, parameters: int, device: str, when: frozenset[str]) -> Iterable[Entry]:
    rollout = config.rollout
    if config.replay is not None:
        return
    if rollout.engine == "embedded":
        embedded = rollout.embedded
        width, servers = WIDTH[embedded.dtype], max(embedded.servers, 1) + config.evaluation.servers
        cache = _cache_bytes(model, embedded.kv_tokens, width)
        yield Entry("weights of the engines", servers * parameters * width, when)
        yield Entry("KV cache of the engines", servers * cache, when)
    elif rollout.engine == "sglang" and not rollout.sglang.urls and device != "cpu":
        if not config.placement.colocate and len(devices.visible(device)) > 1:
            return  # on accelerators of their own
        fraction = rollout.sglang.memory_fraction
        if fraction is not None:
            size = int(fraction * devices.total_memory(device))
            yield Entry(f"SGLang, weights and KV cache (memory_fraction {fraction:g})", size, when)
        else:
            size = parameters * 2 // min(group.tp * group.pp for group in rollout.sglang.groups)
            yield Entry("SGLang's weights, its KV cache not counted", size, when)


def _cache_bytes(model: Path, tokens: int, width: int) -> int:
    """Of a standard KV cache."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return (
        int(config["num_hidden_layers"])
        * 2
        * int(config.get("num_key_value_heads") or heads)
        * head_dim
        * (tokens * width)
    )


def _gib(size: int) -> str:
    if size < GIB // 8:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"
