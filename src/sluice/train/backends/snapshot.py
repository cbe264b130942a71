"""A trainer at one moment, held in host memory and written by any thread while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sluice.train.backends.state import copy_tokenizer_files, random_state, write_state
from sluice.train.base import Writer


class Shell:
    """What there is of a model besides its tensors: class, configuration, names. Training never touches it.

    `save_pretrained` looks at the model that it saves, and one in training changes under its eyes: sharded, its
    parameters are of another precision during a pass.

    Args:
        model: as `load_model` returns it, without adapters or shards.
        source: its folder, whose tokenizer goes along.
        dtype: of the tensors that will be written.
    """

    def __init__(self, model: PreTrainedModel, source: Path, dtype: torch.dtype) -> None:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            shell = type(model)(copy.deepcopy(model.config))
        self._model: PreTrainedModel = torch.nn.Module.to(shell, dtype)  # pyright: ignore[reportAttributeAccessIssue]
        self._model.generation_config = copy.deepcopy(model.generation_config)
        if hasattr(model, "_weight_conversions"):  # how the names of its files became those of its parameters
            self._model._weight_conversions = model._weight_conversions
        self._source = source

    def writer(self, tensors: Mapping[str, Tensor]) -> Writer:
        """Writes a Hugging Face folder with `tensors`, which have the names of the model's parameters."""

        def write(folder: Path) -> None:
            self._model.save_pretrained(folder, state_dict=dict(tensors))
            copy_tokenizer_files(self._source, folder)

        return write


def state_writer(tensors: Mapping[str, Tensor], steps_done: int) -> Writer:
    """Writes optimizer tensors, the step count and torch's random state, which is that of now."""
    everything = {**tensors, **random_state()}
    return lambda folder: write_state(folder, everything, steps_done)


def nothing(folder: Path) -> None:
    """What a rank writes that is not the first."""
