"""The parameter map: Megatron's names beside those of the checkpoint, for every weight of a model."""

from __future__ import annotations

from collections.abc import Iterator

from sluice.train.backends.megatron.families.base import Architecture, Family, Parameter
from sluice.train.backends.megatron.families.splits import (
    Columns,
    FusedGateAndUp,
    GateAndUp,
    GroupedHeads,
    Replicated,
    Rows,
)


def parameters(family: Family, sizes: Architecture) -> tuple[Parameter, ...]:
    """All weights of a model of `family`, in the order of a forward pass.

    Args:
        family: says which there are and how the checkpoint names them.
        sizes: says how large they are; its own `parameters` are not looked at.
    """
    embedding = Rows(sizes.vocabulary)
    shape = (sizes.vocabulary, sizes.hidden)
    found = [Parameter("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (shape,), embedding)]
    for number in range(sizes.layers):
        ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        found += [*_attention(sizes, ours, theirs), *_mlp(family, sizes, ours, theirs)]
    found.append(_norm("decoder.final_layernorm", "model.norm", sizes.hidden))
    if not sizes.tied:
        found.append(Parameter("output_layer.weight", ("lm_head.weight",), (shape,), embedding))
    return tuple(found)


def _attention(sizes: Architecture, ours: str, theirs: str) -> Iterator[Parameter]:
    queries, keys = sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim
    grouped = GroupedHeads(sizes.heads, sizes.groups, sizes.head_dim)
    here, there = f"{ours}self_attention.", f"{theirs}self_attn."
    yield _norm(f"{ours}input_layernorm", f"{theirs}input_layernorm", sizes.hidden)
    for kind, rest in (("weight", (sizes.hidden,)), ("bias", ())):
        if kind == "weight" or sizes.qkv_bias:
            names = tuple(f"{there}{letter}_proj.{kind}" for letter in "qkv")
            shapes = tuple((rows, *rest) for rows in (queries, keys, keys))
            yield Parameter(f"{here}linear_qkv.{kind}", names, shapes, grouped)
    if sizes.qk_norm:
        yield _norm(f"{here}q_layernorm", f"{there}q_norm", sizes.head_dim)
        yield _norm(f"{here}k_layernorm", f"{there}k_norm", sizes.head_dim)
    yield _columns(f"{here}linear_proj", f"{there}o_proj", sizes.hidden, queries)
    if sizes.post_norms:
        yield _norm(f"{here}linear_proj.post_norm", f"{theirs}post_self_attn_layernorm", sizes.hidden)


def _mlp(family: Family, sizes: Architecture, ours: str, theirs: str) -> Iterator[Parameter]:
    here, there = f"{ours}mlp.", f"{theirs}mlp."
    yield _norm(f"{ours}pre_mlp_layernorm", f"{theirs}post_attention_layernorm", sizes.hidden)
    if family.fused_gate_up:
        names, split, rows = (f"{there}gate_up_proj.weight",), FusedGateAndUp(sizes.ffn), 2 * sizes.ffn
    else:
        names, split, rows = (f"{there}gate_proj.weight", f"{there}up_proj.weight"), GateAndUp(sizes.ffn), sizes.ffn
    yield Parameter(f"{here}linear_fc1.weight", names, ((rows, sizes.hidden),) * len(names), split)
    yield _columns(f"{here}linear_fc2", f"{there}down_proj", sizes.hidden, sizes.ffn)
    if sizes.post_norms:
        yield _norm(f"{here}linear_fc2.post_norm", f"{theirs}post_mlp_layernorm", sizes.hidden)


def _norm(ours: str, theirs: str, width: int) -> Parameter:
    return Parameter(f"{ours}.weight", (f"{theirs}.weight",), ((width,),), Replicated())


def _columns(ours: str, theirs: str, rows: int, columns: int) -> Parameter:
    return Parameter(f"{ours}.weight", (f"{theirs}.weight",), ((rows, columns),), Columns(columns))
