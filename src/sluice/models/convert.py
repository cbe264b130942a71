"""A Hugging Face folder written anew in another precision, shard by shard: no model is built, none need fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from sluice.errors import CheckpointError, ConfigError
from sluice.models.build import read_config
from sluice.models.honest import check_shapes, weight_files

ExportDType = Literal["bfloat16", "float16", "float32"]

SHARD_BYTES = 5 * 10**9
"""Tensors of one file; a larger tensor has a file of its own."""
_FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of the number types that a change of precision touches. Others (integers, eight bits) are copied."""
_BESIDE = frozenset({".json", ".jinja", ".txt", ".model"})


def convert_model(source: Path, target: Path, *, dtype: ExportDType | None, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the model folder `source` to the empty folder `target`: weights, config, tokenizer, chat template.

    What the architecture computes in float32 whatever its precision (a router's correction, for example) stays
    float32, as `transformers` would load it.

    Args:
        dtype: of the weights; None keeps what each tensor has.
        shard_bytes: tensors beyond this many bytes go to a further file.

    Returns:
        Bytes of the weights.

    Raises:
        ConfigError: a number does not fit `dtype`, or is none; names the tensor. Or `source` is no model folder.
        CheckpointError: a file cannot be read.
        TrainError: the weights are not those that config.json describes.
        OSError: `target` cannot be written.
    """
    config = read_config(source)
    check_shapes(source, config)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _BESIDE and not file.name.endswith(".safetensors.index.json"):
            shutil.copy2(file, target / file.name)
    files = weight_files(source)
    wanted = _planned(files, _exact_names(config, dtype), dtype)
    total = _write_weights(files, wanted, target, shard_bytes)
    if dtype is not None:
        _declare(target / "config.json", dtype)
    return total


def set_turn_ends(folder: Path, ends: tuple[int, ...]) -> None:
    """Make `generation_config.json` of a folder name every id of `ends`, so that servers end turns there.

    Args:
        ends: ids that end a turn. Those the file names already are kept, in front.
    """
    file = folder / "generation_config.json"
    generation = (
        GenerationConfig.from_pretrained(folder, local_files_only=True)
        if file.is_file()
        else GenerationConfig.from_model_config(read_config(folder))
    )
    known = generation.eos_token_id
    named = [] if known is None else [known] if isinstance(known, int) else list(known)
    merged = list(dict.fromkeys([*named, *ends]))
    generation.eos_token_id = merged[0] if len(merged) == 1 else merged
    generation.save_pretrained(folder)


def _exact_names(config: PretrainedConfig, dtype: ExportDType | None) -> re.Pattern[str] | None:
    """Matches tensors that stay float32 in `dtype`; None when there are none."""
    if dtype in (None, "float32"):
        return None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    modules = set(model._keep_in_fp32_modules_strict or ())
    if dtype == "float16":
        modules |= set(model._keep_in_fp32_modules or ())
    return re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, sorted(modules)))})(?:\.|$)") if modules else None


def _planned(
    files: Mapping[str, Path], exact: re.Pattern[str] | None, dtype: ExportDType | None
) -> dict[str, torch.dtype | None]:
    """The number type of each tensor, None where it is kept."""
    wanted = getattr(torch, dtype) if dtype else None
    return {name: torch.float32 if wanted and exact and exact.search(name) else wanted for name in files}


def _write_weights(
    files: Mapping[str, Path], wanted: Mapping[str, torch.dtype | None], target: Path, shard_bytes: int
) -> int:
    shards = _shards(files, wanted, shard_bytes)
    total, index = 0, dict[str, str]()
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _cast(name, _read(files[name], name), wanted[name]) for name in names}
        save_file(tensors, target / file, metadata={"format": "pt"})
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_index(target, index, total)
    return total


def write_index(folder: Path, files: Mapping[str, str], total: int) -> None:
    """Say which file of a folder has which tensor.

    Args:
        files: by name of the tensor.
        total: bytes of all tensors.
    """
    described = {"metadata": {"total_size": total}, "weight_map": dict(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _shards(files: Mapping[str, Path], wanted: Mapping[str, torch.dtype | None], limit: int) -> list[list[str]]:
    """Names in order, cut where a file would grow beyond `limit` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in _sizes(files, wanted):
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _sizes(files: Mapping[str, Path], wanted: Mapping[str, torch.dtype | None]) -> Iterator[tuple[str, int]]:
    """Bytes that each tensor will have, from the headers alone."""
    for name, file in files.items():
        with _opened(file) as opened:
            part = opened.get_slice(name)
            numbers, kind = 1, str(part.get_dtype())
            for length in part.get_shape():
                numbers *= length
        dtype = wanted[name]
        yield name, numbers * (dtype.itemsize if dtype and kind in _FLOATS else _FLOATS.get(kind, 8))


def _read(file: Path, name: str) -> Tensor:
    with _opened(file) as opened:
        return opened.get_tensor(name)


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights in {file} cannot be read: {error}", hint="choose another checkpoint: --step N"
        ) from error


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in `dtype`. Raises ConfigError when it holds what is no finite number, there or here."""
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return tensor.contiguous()
    if not torch.isfinite(tensor).all():
        raise ConfigError(
            f"{name} holds numbers that are not finite: the training diverged before this checkpoint",
            hint="export an older checkpoint: --step N",
        )
    cast = tensor.to(dtype or tensor.dtype)
    if not torch.isfinite(cast).all():
        largest = tensor.abs().max().item()
        raise ConfigError(
            f"{name} does not fit {str(cast.dtype).removeprefix('torch.')}: its largest number is {largest:g}, "
            f"the type ends at {torch.finfo(cast.dtype).max:g}",
            hint="export with --dtype bfloat16 or float32",
        )
    return cast.contiguous()


def _declare(file: Path, dtype: ExportDType) -> None:
    """Say the precision in config.json, under the name that it has there (older files: `torch_dtype`)."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content.pop("torch_dtype", None)
    content["dtype"] = dtype
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
