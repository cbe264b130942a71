"""What a trainer holds in memory on one device, counted from the headers of a model's files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from sluice.config.train import TrainConfig
from sluice.models.build import read_config
from sluice.train.backends.megatron.families import Architecture, Parameter, architecture, check_layout
from sluice.train.backends.megatron.families.splits import Replicated
from sluice.train.layout import Layout

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
GENERATES, TRAINS = "generates", "trains"


@dataclass(frozen=True, slots=True)
class Entry:
    """One part's memory on one device.

    Attributes:
        what: in words.
        size: bytes.
        when: stages in which it is there.
        waits: bytes of it that lie in host memory in the other stages.
    """

    what: str
    size: int
    when: frozenset[str]
    waits: int = 0


@dataclass(frozen=True, slots=True)
class Holdings:
    """A trainer's memory.

    Attributes:
        entries: of the fullest device.
        host: bytes of host memory that all ranks together take besides, at all times.
        knobs: keys that make it less.
    """

    entries: tuple[Entry, ...]
    host: int
    knobs: str


def torch_holdings(config: TrainConfig, parameters: int, frozen: int, when: frozenset[str]) -> Holdings:
    """Of the torch backend.

    Args:
        parameters, frozen: of the model, and of all frozen policies together.
        when: stages in which the trainer is on its device.
    """
    entries = list(_torch_trainer(config, parameters, when))
    if frozen:
        size = frozen * WIDTH[config.dtype] // config.ranks
        entries.append(Entry("frozen policies", size, when, size))
    return Holdings(tuple(entries), 0, "more train.ranks, train.dtype = 'bfloat16', train.lora")


def _torch_trainer(config: TrainConfig, parameters: int, when: frozenset[str]) -> Iterable[Entry]:
    width = WIDTH[config.dtype]
    share = parameters // config.ranks
    if config.lora is not None:
        yield Entry("trained model, adapters not counted", share * width, when, share * width)
        return
    masters = 0 if width == 4 or config.ranks > 1 else 4
    weights = 4 if config.ranks > 1 else width  # ranks keep float32 and round for every pass
    yield Entry("trained model", share * (weights + masters), when, share * (weights + masters))
    yield Entry("moments", share * 8, when, share * 8)
    yield Entry("gradients", share * 4, frozenset({TRAINS}))


def megatron_holdings(
    config: TrainConfig, model: Path, frozen: int, device: str, when: frozenset[str], *, critic: bool = False
) -> Holdings:
    """Of the Megatron backend: of a rank of the fullest stage, or, where the device is the CPU, of all ranks.

    Frozen policies are of the trained model's architecture. Every rank keeps its part of each in host memory, and puts
    it in the place of the trained weights, which it keeps there too meanwhile.

    Args:
        model: folder of the trained one.
        frozen: number of frozen policies.
        when: see `torch_holdings`.
        critic: there is one, divided as the trained model is; it counts as large as that.

    Raises:
        ConfigError: Megatron does not build this model, or cannot divide it so.
    """
    chosen, layout = config.megatron, Layout.of(config)
    what = architecture(read_config(model))
    check_layout(what, tp=chosen.tp, pp=chosen.pp, vpp=chosen.vpp, cp=chosen.cp)
    stages = stage_parameters(what, tp=chosen.tp, pp=chosen.pp, vpp=chosen.vpp)
    copies = layout.replicas * chosen.cp
    everywhere = sum(stages) * chosen.tp * copies
    held = everywhere if device == "cpu" else max(stages)
    width, exact = WIDTH[config.dtype], config.dtype == "float32"
    masters = 0 if exact else 4  # float32 parameters, where they are not the weights themselves
    if chosen.distributed_optimizer:
        updated, updated_everywhere = held // copies, everywhere // copies
    else:
        updated, updated_everywhere = held, everywhere
    share = 0.0 if device == "cpu" else chosen.offload_optimizer
    optimizer = updated * masters + int(updated * 8 * (1 - share))
    wide = 0 if WIDTH[chosen.gradients] == 4 else updated * 4  # the update's own, of what this rank updates
    gradients = held * WIDTH[chosen.gradients] + wide
    entries = [
        Entry("trained model", held * width, when, held * width),
        Entry("moments" if exact else "float32 parameters and moments", optimizer, when, optimizer),
        Entry("gradients", gradients, when),
    ]
    if critic:
        own = held * width + optimizer
        entries.append(Entry("critic, its gradients and moments", own + gradients, when, own))
    policies = (frozen + 1) * everywhere * width if frozen else 0
    if policies and device == "cpu":
        entries.append(Entry("frozen policies", policies, when))
    there = 16  # what the CPU updates: moments, copies of float32 parameters and gradients
    host = 0 if device == "cpu" else policies + int(updated_everywhere * there * share)
    knobs = (
        "more train.ranks with train.megatron.tp or pp, train.megatron.distributed_optimizer = true, train.dtype = "
        "'bfloat16', train.megatron.gradients = 'bfloat16', train.megatron.offload_optimizer, for activations "
        "train.activation_checkpointing with train.megatron.recompute"
    )
    return Holdings(tuple(entries), host, knobs)


def stage_parameters(what: Architecture, *, tp: int, pp: int, vpp: int) -> list[int]:
    """Parameters at a rank of each pipeline stage. A tied head is kept by the last stage too."""
    found = [0] * pp
    block = what.layers // (pp * vpp)
    for parameter in what.parameters:
        size = sum(map(prod, parameter.shapes)) // (1 if isinstance(parameter.split, Replicated) else tp)
        found[_stage(parameter, block, pp)] += size
        if what.tied and pp > 1 and parameter.name.startswith("embedding."):
            found[-1] += size
    return found


def _stage(parameter: Parameter, block: int, pp: int) -> int:
    part, _, rest = parameter.name.partition(".")
    if part == "embedding":
        return 0
    number = rest.removeprefix("layers.").partition(".")[0]
    return int(number) // block % pp if number.isdigit() else pp - 1


def count_parameters(model: Path) -> int:
    """Parameters in a model's safetensors files, by their headers alone; 0 where there are no such files."""
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                total += prod(int(length) for length in tensors.get_slice(name).get_shape())
    return total
