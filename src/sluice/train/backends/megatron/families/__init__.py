"""Families of models that the Megatron backend builds, one small file each: what they are and how weights map.

Nothing of Megatron is imported here. A new family: its file, one line in `FAMILIES`.
"""

from __future__ import annotations

from types import MappingProxyType

from transformers import PretrainedConfig

from sluice.errors import ConfigError
from sluice.nearest import nearest
from sluice.train.backends.megatron.families.base import Architecture, Family, Parameter
from sluice.train.backends.megatron.families.glm4 import GLM, GLM4
from sluice.train.backends.megatron.families.layout import check_layout
from sluice.train.backends.megatron.families.llama import LLAMA
from sluice.train.backends.megatron.families.qwen2 import QWEN2
from sluice.train.backends.megatron.families.qwen3 import QWEN3
from sluice.train.backends.megatron.families.reading import read_architecture
from sluice.train.backends.megatron.families.splits import SafeSlice, Split

__all__ = ["FAMILIES", "Architecture", "Family", "Parameter", "SafeSlice", "Split", "architecture", "check_layout"]

FAMILIES = MappingProxyType({family.model_type: family for family in (LLAMA, QWEN2, QWEN3, GLM4, GLM)})
"""By `model_type` of config.json."""


def architecture(config: PretrainedConfig) -> Architecture:
    """What a model with `config` is made of.

    Raises:
        ConfigError: the model type is of no family here, or a field of the config asks for what is not built.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        close = nearest(config.model_type, FAMILIES)
        raise ConfigError(
            f"the Megatron backend cannot train model_type {config.model_type!r}"
            f"{f'; did you mean {close!r}?' if close else ''} (it trains {', '.join(FAMILIES)})",
            hint="train.backend = 'torch' trains other models of transformers",
        )
    return read_architecture(family, config)
