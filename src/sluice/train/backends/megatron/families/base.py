"""What a model is, as far as Megatron needs to know it, and what a family of models says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from sluice.train.backends.megatron.families.splits import Split


@dataclass(frozen=True)
class Parameter:
    """One weight of Megatron's and the tensors of a Hugging Face checkpoint that it is made of.

    Args:
        name: Megatron's, with the layer's number counted over the whole model from 0.
        tensors: names in the checkpoint, in the order in which `split` takes and returns them.
        shapes: of those tensors.
        split: the way between tensors and parts of tensor-parallel ranks.
    """

    name: str
    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: Split


@dataclass(frozen=True)
class Architecture:
    """Everything a model is built from.

    Args:
        config: of transformers.
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: query heads.
        groups: key-value heads, a divisor of `heads`.
        head_dim: of queries, keys and values alike.
        ffn: width of the gated MLP (SiLU).
        vocabulary: rows of the embedding.
        eps: of every RMS norm.
        tied: the head is the embedding.
        qkv_bias: queries, keys and values have a bias. No other projection has one.
        qk_norm: queries and keys are normalised per head, before rotation.
        post_norms: the outputs of attention and of the MLP are normalised before they are added.
        rotary_dim: leading dimensions of a head that are rotated, an even number.
        rotary_interleaved: dimensions 2i and 2i + 1 are rotated together, instead of i and i + rotary_dim / 2.
        parameters: all weights, in the order of a forward pass.
    """

    config: PretrainedConfig
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    post_norms: bool
    rotary_dim: int
    rotary_interleaved: bool
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ from each other's, told without their sizes.

    Args:
        model_type: of config.json.
        fixed: fields of the config that change the model in a way that is not built, with the value they must have.
        qkv_bias: whether queries, keys and values have a bias, or the field that says so.
        qk_norm: see `Architecture`.
        post_norms: see `Architecture`.
        fused_gate_up: gate and up projection are one tensor of the checkpoint.
        partial_rotary: `partial_rotary_factor` may be less than 1.
        rotary_interleaved: see `Architecture`.
    """

    model_type: str
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])
    qkv_bias: bool | str = False
    qk_norm: bool = False
    post_norms: bool = False
    fused_gate_up: bool = False
    partial_rotary: bool = False
    rotary_interleaved: bool = False
