"""Sizes and refusals: from a config of transformers to an `Architecture`.

A field of the config that would change what transformers computes, and that is not built, is an error: a model that
trains as another one than it is sampled as would look as if it learned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sluice.errors import ConfigError
from sluice.train.backends.megatron.families.base import Architecture, Family
from sluice.train.backends.megatron.families.parameters import parameters

_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "is_causal": True,
    "quantization_config": None,
}
"""Fields that no family may set otherwise."""
_CHANGING = frozenset({"dynamic", "longrope"})
"""Rope types whose frequencies depend on how long a sequence is."""
_TORCH = "train.backend = 'torch' trains this model"


def read_architecture(family: Family, config: PretrainedConfig) -> Architecture:
    """The architecture of a model of `family`.

    Raises:
        ConfigError: names the field that asks for what is not built, or the sizes that do not fit together.
    """
    given: Any = config
    _check_fields(family, given)
    head_dim = int(getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads)
    bias = family.qkv_bias
    sizes = Architecture(
        config=config,
        layers=given.num_hidden_layers,
        hidden=given.hidden_size,
        heads=given.num_attention_heads,
        groups=given.num_key_value_heads,
        head_dim=head_dim,
        ffn=given.intermediate_size,
        vocabulary=given.vocab_size,
        eps=given.rms_norm_eps,
        tied=given.tie_word_embeddings,
        qkv_bias=bool(getattr(given, bias)) if isinstance(bias, str) else bias,
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        rotary_dim=_rotary_dim(family, given, head_dim),
        rotary_interleaved=family.rotary_interleaved,
        parameters=(),
    )
    return dataclasses.replace(sizes, parameters=parameters(family, sizes))


def _check_fields(family: Family, given: Any) -> None:
    if given.is_heterogeneous:
        raise _refused(given, "per_layer_config", "its layers differ from each other")
    for field, wanted in {**_FIXED, **family.fixed}.items():
        value = getattr(given, field, wanted)
        if value != wanted and value is not None:
            raise _refused(given, field, f"only {wanted!r} is built", value)
    other = sorted(set(getattr(given, "layer_types", None) or ()) - {"full_attention"})
    if other:
        raise _refused(given, "layer_types", f"every layer must be full_attention, not {', '.join(other)}")
    for field in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if getattr(given, field) < 1:
            raise _refused(given, field, "it must be at least 1", getattr(given, field))
    heads, groups = given.num_attention_heads, given.num_key_value_heads
    if not groups or groups < 1 or heads % groups:
        raise _refused(given, "num_key_value_heads", f"it must divide num_attention_heads = {heads}", groups)
    if not getattr(given, "head_dim", None) and given.hidden_size % heads:
        raise _refused(given, "hidden_size", f"num_attention_heads = {heads} must divide it", given.hidden_size)


def _rotary_dim(family: Family, given: Any, head_dim: int) -> int:
    rope: dict[str, Any] = given.rope_parameters or {}
    kind, factor = rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)
    built = ["default", *(name for name in ROPE_INIT_FUNCTIONS if name not in _CHANGING)]
    if kind in _CHANGING:
        raise _refused(given, "rope_parameters.rope_type", "its frequencies change with a sequence's length", kind)
    if kind not in built:
        raise _refused(given, "rope_parameters.rope_type", f"only {', '.join(built)} are built", kind)
    if kind == "proportional":  # frequencies beyond the factor are 0, but there is one for every pair
        factor = 1.0
    if factor != 1 and not family.partial_rotary:
        raise _refused(
            given, "rope_parameters.partial_rotary_factor", f"{family.model_type} rotates whole heads", factor
        )
    rotated = int(head_dim * factor)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise _refused(
            given,
            "rope_parameters.partial_rotary_factor",
            f"of head_dim = {head_dim}, {rotated} dimensions cannot be rotated in pairs",
            factor,
        )
    return rotated


def _refused(given: Any, field: str, why: str, *value: object) -> ConfigError:
    said = f"{field} = {value[0]!r}" if value else field
    return ConfigError(f"the Megatron backend cannot train this {given.model_type} model: {said} ({why})", hint=_TORCH)
