"""Trainer state on disk: what a checkpoint holds beside the model's Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from sluice.errors import CheckpointError

_TENSORS, _COUNTERS = "optimizer.safetensors", "trainer.json"
_PART = "optimizer-{part:05d}-of-{parts:05d}.safetensors"
_RNG = "rng/"
_NOT_ARCHITECTURE = frozenset({"_name_or_path", "transformers_version", "dtype", "architectures", "use_cache"})
_TOKENIZER_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model"})


def random_state() -> dict[str, Tensor]:
    """Torch's random state of now, by names that no optimizer tensor has."""
    found = {f"{_RNG}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"{_RNG}cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def write_state(folder: Path, tensors: Mapping[str, Tensor], steps_done: int, *, part: int = 0, parts: int = 1) -> None:
    """Write tensors, those of `random_state` among them, and the step count to `folder`.

    Args:
        part, parts: which of how many writers this is, each with tensors of its own; the first writes the count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (_TENSORS if parts == 1 else _PART.format(part=part + 1, parts=parts))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    if part == 0:
        (folder / _COUNTERS).write_text(json.dumps({"steps_done": steps_done}), encoding="utf-8")


def state_files(folder: Path) -> list[Path]:
    """The files of tensors that all writers wrote.

    Raises:
        CheckpointError: there is none, or fewer than were written.
    """
    whole = folder / _TENSORS
    if whole.exists():
        return [whole]
    found = sorted(folder.glob(_PART.format(part=0, parts=0).replace("00000", "*")))
    parts = int(found[0].stem.rpartition("-")[2]) if found else 1
    if len(found) != parts:
        raise CheckpointError(
            f"trainer state in {folder} has {len(found)} of its {parts} files", hint="resume from an older checkpoint"
        )
    return found


def read_counters(folder: Path) -> int:
    """The step count of `write_state`.

    Raises:
        CheckpointError: its file is missing or damaged.
    """
    try:
        return int(json.loads((folder / _COUNTERS).read_text(encoding="utf-8"))["steps_done"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"trainer state in {folder} cannot be read: {error}", hint="resume from an older checkpoint"
        ) from error


def read_state(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Inverse of `write_state`; also restores torch's random state.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    steps_done = read_counters(folder)
    try:
        everything = {name: tensor for file in state_files(folder) for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"trainer state in {folder} cannot be read: {error}", hint="resume from an older checkpoint"
        ) from error
    random = {name: everything.pop(name) for name in list(everything) if name.startswith(_RNG)}
    torch.set_rng_state(random[f"{_RNG}cpu"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(devices):
        if f"{_RNG}cuda{number}" in random:
            torch.cuda.set_rng_state(random[f"{_RNG}cuda{number}"], number)
    return everything, steps_done


def check_same_architecture(folder: Path, config: PretrainedConfig) -> None:
    """Raise CheckpointError naming the first field in which `folder/config.json` is not `config`."""
    try:
        saved: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the model in {folder} cannot be read: {error}", hint="resume from an older checkpoint"
        ) from error
    ours: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for field in ("model_type", *sorted(ours.keys() & saved.keys())):
        if field not in _NOT_ARCHITECTURE and saved.get(field) != ours.get(field):
            raise CheckpointError(
                f"the model in {folder} is of another architecture: its {field} is {saved.get(field)!r}, "
                f"that of this run is {ours.get(field)!r}",
                hint="resume with the model the run was started with, or start a new run",
            )


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights in `source` (tokenizer, chat template) and is not in `folder` yet."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _TOKENIZER_SUFFIXES and not file.name.endswith(".index.json")
        if wanted and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)
