"""A trainer's weights and state on disk, written by the ranks that hold whole tensors, each its stages, and read again
in parts. The files are those of the torch backend, cut in several where several ranks write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sluice.errors import CheckpointError
from sluice.models.build import read_config
from sluice.models.convert import SHARD_BYTES, write_index
from sluice.train.backends.megatron.division import pipeline_group
from sluice.train.backends.megatron.families import Architecture, Parameter
from sluice.train.backends.megatron.owned import writes
from sluice.train.backends.megatron.state import MASTER, MOMENTS
from sluice.train.backends.snapshot import nothing
from sluice.train.backends.state import copy_tokenizer_files, random_state, read_counters, state_files, write_state
from sluice.train.base import Writer


@dataclass(frozen=True, slots=True)
class _Place:
    """Which of the ranks that write this is, and what each of them said."""

    number: int
    told: Sequence[Any]


def _meet(mine: Any) -> _Place:
    """What the stages of the pipeline say; a call of all ranks."""
    group = pipeline_group()
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, mine, group=group)
    return _Place(group.rank(), told)


def model_writer(source: Path, weights: Mapping[str, Tensor], dtype: str) -> Writer:
    """Writes a Hugging Face folder of all stages; a call of all ranks.

    Args:
        source: folder of the first weights, whose config and tokenizer go along.
        weights: of this rank's stages, whole; empty where it does not write.
        dtype: which the config says.
    """
    shards = list(_shards(weights))
    place = _meet([{name: tensor.nbytes for name, tensor in shard.items()} for shard in shards])
    if not writes():
        return nothing
    total = sum(len(told) for told in place.told)
    first = sum(len(told) for told in place.told[: place.number])
    files = (
        ["model.safetensors"] if total == 1 else [f"model-{n + 1:05d}-of-{total:05d}.safetensors" for n in range(total)]
    )

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, shard in enumerate(shards, start=first):
            save_file(shard, folder / files[number], metadata={"format": "pt"})
        if place.number:
            return
        config = read_config(source)
        config.dtype = dtype
        config.save_pretrained(folder)
        copy_tokenizer_files(source, folder)
        if total > 1:
            held: list[dict[str, int]] = [sizes for told in place.told for sizes in told]
            index = {name: file for file, sizes in zip(files, held, strict=True) for name in sizes}
            write_index(folder, index, sum(sum(sizes.values()) for sizes in held))

    return write


def _shards(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard, filled = dict[str, Tensor](), 0
    for name, tensor in weights.items():
        if shard and filled + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, filled = {}, 0
        shard[name] = tensor
        filled += tensor.nbytes
    if shard:
        yield shard


def optimizer_writer(tensors: Mapping[str, Tensor], steps_done: int) -> Writer:
    """Writes the state of all stages; a call of all ranks.

    Args:
        tensors: of this rank's stages, as `whole_state` returns them.
    """
    place = _meet(None)
    if not writes():
        return nothing
    everything = dict(tensors) if place.number else {**tensors, **random_state()}
    return lambda folder: write_state(folder, everything, steps_done, part=place.number, parts=len(place.told))


class SavedState:
    """What `optimizer_writer` of either backend wrote, read in parts. Torch's random state is restored on the way.

    Args:
        folder: of the state.
        described: what its names and shapes must be.
        masters: which parameters have float32 values there besides.
        also: further kinds of tensors that there must be of each parameter.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, too much or of another shape; names it.
    """

    def __init__(
        self,
        folder: Path,
        described: Architecture,
        *,
        masters: Callable[[Parameter], bool],
        also: tuple[str, ...] = (),
    ) -> None:
        self._opened = ExitStack()
        self._slices: dict[str, Any] = {}
        self.steps_done = read_counters(folder)
        try:
            for file in state_files(folder):
                opened: Any = self._opened.enter_context(safe_open(file, framework="pt"))
                self._slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            self._opened.close()
            raise CheckpointError(
                f"trainer state in {folder} cannot be read: {error}", hint="resume from an older checkpoint"
            ) from error
        self._restore_random_state()
        self._check(described, masters, also)

    def part(self, kind: str, parameter: Parameter, rank: int, size: int) -> Tensor:
        """What tensor-parallel rank `rank` of `size` holds of it, float32."""
        return parameter.split.part([self._slices[f"{kind}/{name}"] for name in parameter.tensors], rank, size).float()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slices.clear()
        self._opened.close()

    def _restore_random_state(self) -> None:
        for name in [name for name in self._slices if name.startswith("rng/")]:
            state = self._slices.pop(name)
            if name == "rng/cpu":
                torch.set_rng_state(state[:])

    def _check(self, described: Architecture, masters: Callable[[Parameter], bool], also: tuple[str, ...]) -> None:
        kinds = (*also, *(MOMENTS if self.steps_done else ()))
        expected: dict[str, tuple[int, ...]] = {}
        for parameter in described.parameters:
            for name, shape in zip(parameter.tensors, parameter.shapes, strict=True):
                expected |= {f"{kind}/{name}": shape for kind in kinds}
                if masters(parameter):
                    expected[f"{MASTER}/{name}"] = shape
                if self.steps_done:
                    expected[f"step/{name}"] = ()
        for name in sorted(expected.keys() | self._slices.keys()):
            found = tuple(self._slices[name].get_shape()) if name in self._slices else "missing"
            wanted = expected.get(name, "not expected")
            if found != wanted:
                raise CheckpointError(
                    f"optimizer state {name}: the checkpoint has {found}, this trainer wants {wanted}",
                    hint="resume with the model and train.dtype that the checkpoint was written with",
                )
