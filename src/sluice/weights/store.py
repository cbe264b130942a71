"""Publishing: a trainer's parameters become an immutable, checksummed version. Activating is separate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from sluice.errors import WeightsError
from sluice.weights.base import Manifest, Published, Sink, Source, TensorInfo
from sluice.weights.lineage import Lineage


def digest(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's bytes, in hex; the tensor may be on any device."""
    raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128_hexdigest(raw)  # pyright: ignore[reportArgumentType]


def tensor_info(tensor: Tensor) -> TensorInfo:
    """Dtype, shape and digest of a tensor."""
    return TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digest(tensor))


def checksum(tensors: Mapping[str, TensorInfo]) -> str:
    """One xxh3-128 over names, dtypes, shapes and digests, in the order of names; hex."""
    rows = [[name, info.dtype, list(info.shape), info.digest] for name, info in sorted(tensors.items())]
    return xxhash.xxh3_128_hexdigest(json.dumps(rows, separators=(",", ":")).encode())


class MemoryWeights:
    """A version held in host memory; written to a folder the first time somebody asks for one."""

    def __init__(self, manifest: Manifest, tensors: dict[str, Tensor], home: Path, model_files: Path) -> None:
        self._manifest = manifest
        self._tensors = tensors
        self._home = home
        self._model_files = model_files
        self._holders = 1  # who made it

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()

    def folder(self) -> Path:
        """Write the version as a Hugging Face folder, once, and return it. Atomic: torn folders are not seen.

        Raises:
            WeightsError: it cannot be written.
        """
        folder = self._home / f"v{self._manifest.version}"
        if folder.exists():
            return folder
        torn = self._home / f".{folder.name}.tmp"
        try:
            shutil.rmtree(torn, ignore_errors=True)
            torn.mkdir(parents=True)
            for file in self._model_files.iterdir():
                if file.is_file() and file.suffix in {".json", ".jinja", ".txt", ".model"} and "index" not in file.name:
                    shutil.copy2(file, torn / file.name)
            save_file(self._tensors, torn / "model.safetensors", metadata={"format": "pt"})
            torn.rename(folder)
        except OSError as error:
            shutil.rmtree(torn, ignore_errors=True)
            raise WeightsError(
                f"version {self._manifest.version} could not be written to {folder}: {error}",
                hint="free space there; nothing was activated, engines keep what they serve",
            ) from error
        return folder

    def hold(self) -> None:
        """Keep it until the matching `release`.

        Raises:
            WeightsError: it is gone already.
        """
        if self._holders == 0:
            raise WeightsError(f"version {self._manifest.version} was released: nobody held it any more")
        self._holders += 1

    def release(self) -> None:
        """Let go; the last holder's release forgets the tensors and removes the folder."""
        self._holders -= 1
        if self._holders == 0:
            self._tensors = {}
            shutil.rmtree(self._home / f"v{self._manifest.version}", ignore_errors=True)


class WeightStore:
    """Published versions of one policy.

    Args:
        home: folder for versions that an engine reads from disk.
        model_files: the model's folder, whose config and tokenizer files go along with the weights.
        lineage: names the versions; shared with the gate, which counts lag along it.
    """

    def __init__(self, home: Path, model_files: Path, lineage: Lineage) -> None:
        self._home = home
        self._model_files = model_files
        self._lineage = lineage
        self._held: list[MemoryWeights] = []

    def publish(self, source: Source, step: int) -> MemoryWeights:
        """Copy the parameters as they are now and name them.

        The version's parent is the one published before. The store lets go of older versions; an engine holds
        what it may have to load again, until it has this one.

        Raises:
            WeightsError: the source yields a name twice, or nothing.
        """
        parent = self._lineage.current
        tensors: dict[str, Tensor] = {}
        for name, tensor in source.named_weights():
            if name in tensors:
                raise WeightsError(f"the trainer yields the parameter {name} twice")
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if not tensors:
            raise WeightsError("the trainer yields no parameters")
        infos = {name: tensor_info(tensor) for name, tensor in tensors.items()}
        total = checksum(infos)
        version = self._lineage.name(step, parent, total)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        manifest = Manifest(version, parent, total, infos, num_bytes)
        for old in self._held:
            old.release()
        self._held = [MemoryWeights(manifest, tensors, self._home, self._model_files)]
        return self._held[0]


async def activate(published: Published, sinks: Sequence[Sink]) -> None:
    """Give a version to every sink, one after the other.

    A sink that fails is left unroutable (see `Sink`) and gets one full retry; then the failure is raised.

    Raises:
        WeightsError: a sink could not take the version.
    """
    for sink in sinks:
        try:
            await sink.apply(published)
        except WeightsError as first:
            try:
                await sink.apply(published)
            except WeightsError as second:
                raise WeightsError(
                    f"{sink.name} did not take version {published.manifest.version}, nor on a second try: {second}",
                    hint="it serves nothing until it does; restart the engine and resume the run",
                ) from first
