"""Swapping a published version of the weights into a model, all of it or none of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sluice.errors import WeightsError
from sluice.weights.base import Manifest, Published, TensorInfo
from sluice.weights.store import digest


def activate(weights: Mapping[str, Tensor], published: Published) -> None:
    """Copy `published` into `weights` in place.

    Two passes over the published tensors: the first only compares names, shapes, dtypes and digests with
    the manifest and with `weights`; the second copies, and each copied tensor is digested again where it
    lies.

    Raises:
        WeightsError: something differs. Nothing was touched unless the message says that a copy differs.
    """
    manifest = published.manifest
    _check_names(weights, set(manifest.tensors), manifest, "its manifest")
    for name, info in manifest.tensors.items():
        _check_info(name, info, weights[name], manifest)
    seen: set[str] = set()
    for name, tensor in published.tensors():
        seen.add(name)
        if name not in weights:
            raise WeightsError(f"version {manifest.version} holds {name}, which its manifest does not list")
        _check_tensor(name, tensor, manifest)
    _check_names(weights, seen, manifest, "what can be read of it")
    with torch.no_grad():
        for name, tensor in published.tensors():
            weights[name].copy_(tensor)
            if digest(weights[name]) != manifest.tensors[name].digest:
                raise WeightsError(
                    f"{name} differs from version {manifest.version} after it was copied into the engine",
                    hint="the published files changed while they were read; publish again",
                )


def _check_names(weights: Mapping[str, Tensor], names: set[str], manifest: Manifest, where: str) -> None:
    missing, extra = sorted(weights.keys() - names), sorted(names - weights.keys())
    if missing or extra:
        raise WeightsError(
            f"version {manifest.version} does not fit this engine: {where} lacks {_few(missing)} and has "
            f"{_few(extra)} besides",
            hint="trainer and engine must be built from the same model; tied tensors count once",
        )


def _check_info(name: str, info: TensorInfo, mine: Tensor, manifest: Manifest) -> None:
    dtype = str(mine.dtype).removeprefix("torch.")
    if tuple(info.shape) != tuple(mine.shape) or info.dtype.removeprefix("torch.") != dtype:
        raise WeightsError(
            f"{name} of version {manifest.version} is {info.dtype}{list(info.shape)}; the engine's is "
            f"{dtype}{list(mine.shape)}",
            hint="publish in the engine's dtype, or change rollout.embedded.dtype",
        )


def _check_tensor(name: str, tensor: Tensor, manifest: Manifest) -> None:
    info = manifest.tensors[name]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != tuple(info.shape) or dtype != info.dtype.removeprefix("torch."):
        raise WeightsError(
            f"{name} of version {manifest.version} reads as {dtype}{list(tensor.shape)}, its manifest says "
            f"{info.dtype}{list(info.shape)}"
        )
    if digest(tensor) != info.digest:
        raise WeightsError(
            f"the bytes of {name} are not those of version {manifest.version}",
            hint="the published files are damaged; publish again",
        )


def _few(names: list[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
