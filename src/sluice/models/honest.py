"""Whether the weights of a folder are those that its config describes, told from their headers.

transformers draws what is missing at random, leaves what it does not know aside, and ties a head that the files hold
apart. Here each is an error that names the tensor and, where one can be found, the field of config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from sluice.errors import TrainError
from sluice.models.names import module_weights

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def check_shapes(path: Path, config: PretrainedConfig) -> None:
    """Compare shapes in the headers of `path`'s safetensors with the model that `config` makes; nothing is loaded.

    Raises:
        TrainError: a tensor has another shape, or embedding and head are tied in the config but not in the files.
    """
    files = weight_files(path)
    if not files:
        return  # transformers tells which names it looks for
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    expected = {
        name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, module_weights(model)).items()
    }
    for name, file in files.items():
        shape = expected.get(name)
        found = _shape(file, name) if shape is not None else None
        if shape is not None and found != shape:
            raise TrainError(
                f"{name} in {path} is {list(found or ())}, but config.json makes it {list(shape)}"
                f"{blame(config, shape, found or ())}",
                hint="config.json and the safetensors files are of different models: copy both from the same place",
            )
    for target, source in model.all_tied_weights_keys.items():
        check_tied(path, target, source, files)


def check_report(path: Path, config: PretrainedConfig, report: Mapping[str, Collection[str]]) -> None:
    """Refuse what transformers reports after loading and goes on with: tensors that are missing or left over.

    Layers beyond the last that predict more than one token ahead are left aside.

    Raises:
        TrainError: names the first one.
    """
    absent = sorted(report["missing_keys"])
    if absent:
        tied = "lm_head.weight" in absent and not config.get_text_config().tie_word_embeddings
        raise TrainError(
            f"the weights in {path} lack {len(absent)} tensors that config.json asks for, first {absent[0]}",
            hint="if the model's head is its embedding, config.json must say tie_word_embeddings = true"
            if tied
            else "copy all safetensors shards of the model into the folder, with their config.json",
        )
    text: Any = config.get_text_config()
    layers = int(getattr(text, "num_hidden_layers", 0))
    further = getattr(text, "num_nextn_predict_layers", None) or getattr(text, "num_mtp_layers", None) or 0
    ahead = range(layers, layers + int(further))
    extra = sorted(name for name in report["unexpected_keys"] if not _belongs_to(name, ahead))
    if extra:
        found = _LAYER.search(f".{extra[0]}")
        why = f": its num_hidden_layers is {layers}" if found and int(found[1]) >= layers else ""
        raise TrainError(
            f"the weights in {path} hold {len(extra)} tensors that config.json does not know{why}, first {extra[0]}",
            hint="config.json and the safetensors files are of different models: copy both from the same place",
        )


def _belongs_to(name: str, layers: range) -> bool:
    found = _LAYER.search(f".{name}")
    return name.endswith("inv_freq") or (found is not None and int(found[1]) in layers)


def weight_files(path: Path) -> dict[str, Path]:
    """Which file of the folder holds each tensor, as transformers would read them; empty when there is none.

    Raises:
        TrainError: the index or a header is damaged.
    """
    try:
        if (path / _INDEX).is_file():
            index: dict[str, str] = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: path / file for name, file in index.items()}
        if (path / _SINGLE).is_file():
            with safe_open(path / _SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), path / _SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TrainError(
            f"the weights in {path} cannot be read: {error}", hint="copy the safetensors files of the model anew"
        ) from error
    return {}


def _shape(file: Path, name: str) -> tuple[int, ...]:
    try:
        with safe_open(file, framework="pt") as opened:
            return tuple(opened.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise TrainError(
            f"{name} cannot be read from {file}: {error}", hint="copy the safetensors files of the model anew"
        ) from error


def blame(config: PretrainedConfig, expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    """The fields of the config whose value is an expected size that the file contradicts."""
    wrong = {ours for ours, theirs in zip(expected, found, strict=False) if ours != theirs}
    sizes = {key: value for key, value in config.get_text_config().to_dict().items() if type(value) is int}
    fields = [f"{key} = {value}" for key, value in sizes.items() if value in wrong]
    return f" ({', '.join(fields)})" if fields else ""


def check_tied(path: Path, target: str, source: str, files: Mapping[str, Path]) -> None:
    """Compare two tensors that the config ties, where `files` of the folder `path` holds both.

    Raises:
        TrainError: they differ.
    """
    if target not in files or source not in files:
        return
    with safe_open(files[target], framework="pt") as one, safe_open(files[source], framework="pt") as two:
        same = torch.equal(one.get_tensor(target), two.get_tensor(source))
    if not same:
        raise TrainError(
            f"config.json in {path} says tie_word_embeddings = true, but {target} and {source} differ",
            hint="set tie_word_embeddings = false in config.json, or restore the file from the model",
        )
