"""Models and tokenizers from local Hugging Face folders, and small ones made from scratch. No network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from sluice.config.model import DType, ScratchConfig
from sluice.errors import ConfigError, TrainError
from sluice.models.honest import check_report, check_shapes
from sluice.models.tokenizer import EOS, PAD, build_tokenizer
from sluice.nearest import nearest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""One of these makes a folder hold a tokenizer."""
transformers_logging.disable_progress_bar()  # one line a shard, between our own lines
_ALWAYS_ALLOWED = frozenset({"model_type", "rope_theta", "rope_scaling", "head_dim"})
"""Keys every config class takes besides its fields: the two rope keys are folded into `rope_parameters`, and models
whose config has no `head_dim` ask for it all the same."""


def torch_dtype(name: DType) -> torch.dtype:
    """`float32` or `bfloat16` as torch knows it."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_model(path: Path, *, dtype: DType | torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """The causal language model of a local folder, in evaluation mode on the CPU.

    Args:
        path: folder with `config.json` and safetensors weights.
        dtype: of every parameter.
        attn_implementation: a name registered with `transformers.AttentionInterface`, or `sdpa`, `eager`.

    Raises:
        ConfigError: the folder or a file is missing, or the model type is unknown.
        TrainError: the weights do not fit the configuration; names the tensor and the field.
    """
    config = read_config(path)
    wanted = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    try:
        check_shapes(path, config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=wanted,
            attn_implementation=attn_implementation,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,  # makes the result a pair
        )
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise TrainError(
            f"the model in {path} could not be loaded: {error}",
            hint="check that config.json and the safetensors files belong together",
        ) from error
    model, report = loaded
    check_report(path, config, report)
    return model.eval()


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """`model` itself, moved to `device`."""
    torch.nn.Module.to(model, device)  # transformers' own override is typed as a plain function
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, checked against the vocabulary of the model beside it.

    Raises:
        ConfigError: the folder or the tokenizer is missing, it has no end-of-sequence token, or it has
            more ids than the model.
    """
    check_model_folder(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):  # transformers would make an empty one
        raise ConfigError(
            f"{path} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the tokenizer in {path} could not be loaded: {error}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer in {path} names no end-of-sequence token, so no turn could ever end",
            hint="set eos_token in tokenizer_config.json",
        )
    check_vocabulary(tokenizer, read_config(path), where=str(path))
    return tokenizer


def make_scratch(config: ScratchConfig, folder: Path, *, seed: int) -> None:
    """Write a randomly initialised model and its tokenizer to `folder` as a Hugging Face folder.

    The same config and seed give the same bytes. `vocab_size`, when left out, is the tokenizer's, and never less;
    the ids of the special tokens are the tokenizer's too. Weights are float32.

    Raises:
        ConfigError: the model type or a key of the architecture is unknown, or the vocabulary disagrees.
    """
    tokenizer = build_tokenizer(config.tokenizer)
    architecture = dict(config.architecture)
    model_type = str(architecture.pop("model_type", ""))
    _check_model_type(model_type, "model.scratch.architecture.model_type")
    config_class = CONFIG_MAPPING[model_type]
    _check_architecture_keys(config_class, architecture)
    given = architecture.setdefault("vocab_size", len(tokenizer))
    if not isinstance(given, int) or given < len(tokenizer):
        raise ConfigError(
            f"model.scratch.architecture.vocab_size is {given}, but the tokenizer has {len(tokenizer)} ids",
            hint="leave vocab_size out: it follows from the tokenizer; more is allowed, so that ranks can divide it",
        )
    architecture.setdefault("pad_token_id", tokenizer.convert_tokens_to_ids(PAD))
    architecture.setdefault("eos_token_id", tokenizer.convert_tokens_to_ids(EOS))
    architecture.setdefault("bos_token_id", None)
    try:
        model_config = config_class(**architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        with torch.no_grad():  # heads that do not divide each other show only in a forward pass
            model(torch.zeros(1, 2, dtype=torch.long))
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"model.scratch.architecture does not make a {model_type} model: {error}",
            hint="check that hidden_size, the numbers of heads and head_dim fit together",
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, *, where: str) -> None:
    """Raise ConfigError when the tokenizer can produce ids that the model has no embedding for.

    A model may have more rows than the tokenizer has ids: embeddings are often padded to a round number.
    """
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ConfigError(
            f"{where}: the tokenizer has {len(tokenizer)} ids, but the model's vocabulary has {rows}",
            hint="use the tokenizer files that came with the model",
        )


def check_model_folder(path: Path) -> None:
    """Raise ConfigError unless `path` holds a config of a known causal language model and safetensors."""
    if not path.is_dir():
        raise ConfigError(
            f"model folder {path} does not exist",
            hint="set model.path to a folder with config.json, safetensors and tokenizer files",
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json", hint="set model.path to the folder of a Hugging Face model")
    if not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{path} has no safetensors weights",
            hint="copy the *.safetensors files of the model into it; other weight formats are not read",
        )
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConfigError(
            f"{path / 'config.json'} is not a JSON object: {error}", hint="restore the file from the model"
        ) from error
    _check_model_type(model_type, str(path / "config.json"))


def read_config(path: Path) -> PretrainedConfig:
    """The config of a local model folder.

    Raises:
        ConfigError: the folder is not that of a causal language model.
    """
    check_model_folder(path)
    kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    return CONFIG_MAPPING[kind].from_pretrained(path, local_files_only=True)


def _check_model_type(model_type: str, where: str) -> None:
    if not model_type:
        raise ConfigError(f"{where} is missing", hint="name the architecture, for example model_type = 'qwen3'")
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type in CONFIG_MAPPING:
        return
    if model_type in CONFIG_MAPPING:
        raise ConfigError(
            f"{where}: {model_type!r} is not a causal language model",
            hint="use a type that transformers' AutoModelForCausalLM builds, such as 'qwen3' or 'llama'",
        )
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    raise ConfigError(
        f"{where}: unknown model type {model_type!r}{_meant(model_type, known)}",
        hint="use a model type of the installed transformers release, or upgrade it",
    )


def _check_architecture_keys(config_class: Any, architecture: dict[str, Any]) -> None:
    """Config classes keep unknown keywords as attributes; a misspelt size must not pass unseen."""
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    for key in architecture:
        if key not in known and key not in _ALWAYS_ALLOWED:
            raise ConfigError(
                f"model.scratch.architecture: {config_class.model_type} has no key {key!r}" + _meant(key, known),
                hint="see the fields of the model's config class in transformers",
            )


def _meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or nothing when none is close."""
    close = nearest(name, known)
    return f"; did you mean {close!r}?" if close else ""
