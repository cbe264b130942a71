"""What a config makes of a model, how weights map and split, and what is refused; no Megatron."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron_models import VARIANTS, config_of
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sluice.errors import ConfigError
from sluice.train.backends.megatron.families import FAMILIES, Family, architecture, check_layout


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_map_covers_what_transformers_has(variant: str) -> None:
    config = config_of(variant)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = [
        (name, shape)
        for each in architecture(config).parameters
        for name, shape in zip(each.tensors, each.shapes, strict=True)
    ]
    assert len(found) == len(dict(found))
    assert dict(found) == expected


class Counted:
    """A slice that counts the numbers read through it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self.read = tensor, 0

    def __getitem__(self, index: Any) -> Tensor:
        found = self._tensor[index]
        self.read += found.numel()
        return found


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "glm4"])
def test_a_rank_reads_what_it_holds_and_no_more(variant: str) -> None:
    torch.manual_seed(1)
    for each in architecture(config_of(variant)).parameters:
        for rank in range(4):
            slices = [Counted(torch.randn(shape)) for shape in each.shapes]
            part = each.split.part(slices, rank, 4)
            assert sum(one.read for one in slices) == part.numel()
            assert part.numel() * (1 if "norm" in each.name else 4) == sum(
                torch.Size(shape).numel() for shape in each.shapes
            )


def test_rows_stand_as_megatron_reads_them() -> None:
    model = architecture(config_of("qwen2"))
    known = {each.name: each for each in model.parameters}
    queries, keys, values = torch.arange(32), 100 + torch.arange(16), 200 + torch.arange(16)
    bias = known["decoder.layers.2.self_attention.linear_qkv.bias"]
    assert bias.tensors == tuple(f"model.layers.2.self_attn.{letter}_proj.bias" for letter in "qkv")
    second = bias.split.part([queries, keys, values], 1, 2)
    group = [
        [*range(8 * g, 8 * g + 8), *range(100 + 4 * g, 104 + 4 * g), *range(200 + 4 * g, 204 + 4 * g)] for g in (2, 3)
    ]
    assert second.tolist() == [*group[0], *group[1]]
    gate, up = torch.arange(40), 100 + torch.arange(40)
    fused = {each.name: each for each in architecture(config_of("glm4", head_dim=8)).parameters}
    for split, slices in (
        (known["decoder.layers.0.mlp.linear_fc1.weight"].split, [gate, up]),
        (fused["decoder.layers.0.mlp.linear_fc1.weight"].split, [torch.cat([gate, up])]),
    ):
        assert split.part(slices, 3, 4).tolist() == [*range(30, 40), *range(130, 140)]
    out = known["decoder.layers.0.self_attention.linear_proj.weight"]
    assert torch.equal(
        out.split.part([torch.arange(1024).view(32, 32)], 1, 4), torch.arange(1024).view(32, 32)[:, 8:16]
    )


def test_names_are_those_of_megatron() -> None:
    names = [each.name for each in architecture(config_of("glm4", head_dim=8, num_hidden_layers=1)).parameters]
    assert names == [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_proj.post_norm.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.0.mlp.linear_fc2.post_norm.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]
    assert {
        "decoder.layers.2.self_attention.q_layernorm.weight",
        "decoder.layers.2.self_attention.k_layernorm.weight",
    } < {each.name for each in architecture(config_of("qwen3")).parameters}


# ── configs ────────────────────────────────────────────────────────────────────────────────────────────────

NAMED = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_rope_types_with_fixed_frequencies_are_taken(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **NAMED.get(kind, {})}
    if kind != "default":
        rope["factor"] = 2.0
    model = architecture(config_of("llama", rope_parameters=rope))
    assert (model.rotary_dim, model.rotary_interleaved) == (4, False)


def test_part_of_a_head_may_be_rotated_in_glm() -> None:
    model = architecture(config_of("glm4", head_dim=16))
    assert (model.rotary_dim, model.rotary_interleaved) == (8, True)
    assert architecture(config_of("glm4", head_dim=16, partial_rotary_factor=1.0)).rotary_dim == 16


def test_windows_that_are_not_used_are_taken() -> None:
    for family in ("qwen2", "qwen3"):
        architecture(config_of(family, sliding_window=8, use_sliding_window=False))
        architecture(config_of(family, sliding_window=8, use_sliding_window=True, max_window_layers=3))


def _published(
    model_type: str, hidden: int, layers: int, heads: int, groups: int, ffn: int, rows: int, **rest: Any
) -> Any:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ffn, "vocab_size": rows}
    return CONFIG_MAPPING[model_type](**sizes, num_attention_heads=heads, num_key_value_heads=groups, **rest)


@pytest.mark.parametrize(
    ("config", "weights", "rotary_dim"),
    [
        pytest.param(
            _published("llama", 576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True), 134515008, 64, id="SmolLM2-135M"
        ),
        pytest.param(
            _published(
                "llama", 2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True, rope_theta=500000.0,
                rope_scaling={"rope_type": "llama3", "factor": 32.0, **NAMED["llama3"]},
            ),
            1235814400, 64, id="Llama-3.2-1B",
        ),
        pytest.param(_published("qwen2", 3584, 28, 28, 4, 18944, 152064), 7615616512, 128, id="Qwen2.5-7B"),
        pytest.param(_published("qwen3", 4096, 36, 32, 8, 12288, 151936), 8190735360, 128, id="Qwen3-8B"),
        pytest.param(_published("glm4", 4096, 40, 32, 2, 13696, 151552), 9400279040, 64, id="GLM-4-9B-0414"),
    ],
)  # fmt: skip
def test_published_models_have_their_published_size(config: Any, weights: int, rotary_dim: int) -> None:
    model = architecture(config)
    assert sum(torch.Size(shape).numel() for each in model.parameters for shape in each.shapes) == weights
    assert model.rotary_dim == rotary_dim


ROPE: dict[str, Any] = {"rope_theta": 10000.0, "factor": 2.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("glm4", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("llama", {"attention_bias": True}, "attention_bias = True"),
    ("qwen3", {"attention_bias": True}, "attention_bias = True"),
    ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp = 2"),
    ("qwen2", {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ("qwen3", {"is_causal": False}, "is_causal = False"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ("qwen3", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}, "rope_parameters.rope_type = 'dynamic'"),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                **ROPE,
                "short_factor": [1.0, 1.0],
                "long_factor": [2.0, 2.0],
                "original_max_position_embeddings": 64,
            }
        },
        "rope_parameters.rope_type = 'longrope'",
    ),
    ("llama", {"rope_parameters": {"rope_type": "spiral", **ROPE}}, "rope_parameters.rope_type = 'spiral'"),
    ("qwen2", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor = 0.5"),
    ("glm4", {"head_dim": 6}, "3 dimensions cannot be rotated in pairs"),
    ("qwen2", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads = 3 (it must divide num_attention_heads = 8)"),
    ("qwen2", {"hidden_size": 36, "num_attention_heads": 8}, "hidden_size = 36"),
    ("qwen3", {"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers = 0"),
    ("llama", {"per_layer_config": {0: {"intermediate_size": 24}}}, "per_layer_config"),
]


@pytest.mark.parametrize(("family", "changes", "said"), REFUSED, ids=[f"{one[0]}: {one[2]}" for one in REFUSED])
def test_what_is_not_built_is_refused_by_name(family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        architecture(config_of(family, **changes))
    assert said in str(caught.value)
    assert f"this {family} model" in str(caught.value)
    assert "train.backend = 'torch'" in str(caught.value)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        architecture(CONFIG_MAPPING["qwen3_moe"]())
    message = str(caught.value)
    assert "model_type 'qwen3_moe'" in message
    assert all(name in message for name in FAMILIES)
    assert "train.backend = 'torch' trains other models" in message


READ = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
    "hidden_act", "attention_dropout", "layer_types",
})  # fmt: skip
"""Fields that become sizes, or are checked in every family."""
WITHOUT_EFFECT = frozenset({
    "max_position_embeddings", "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "use_sliding_window", "sliding_window", "max_window_layers",
})  # fmt: skip
"""Windows act through `layer_types`."""


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_no_field_of_transformers_is_overlooked(family: Family) -> None:
    config: Any = CONFIG_MAPPING[family.model_type]
    known = READ | WITHOUT_EFFECT | set(family.fixed) | {family.qkv_bias}
    assert set(config.__annotations__) - known == set(), (
        "read, fix or refuse the field, or say here that it changes nothing"
    )


# ── layouts ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"tp": 8}, "tp = 8 does not divide the model's num_key_value_heads = 4"),
        ({"tp": 3}, "tp = 3 does not divide the model's num_attention_heads = 8"),
        ({"pp": 2}, "pp = 2 does not divide the model's num_hidden_layers = 3"),
        ({"pp": 3, "vpp": 2}, "pp × vpp = 3 × 2 does not divide the model's num_hidden_layers = 3"),
        ({"cp": 0}, "cp = 0"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(layout: dict[str, int], said: str) -> None:
    model = architecture(config_of("llama"))
    with pytest.raises(ConfigError) as caught:
        check_layout(model, **{"tp": 1, "pp": 1, "vpp": 1, "cp": 1, **layout})
    assert said in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("intermediate_size", 42), ("vocab_size", 50)])
def test_every_cut_size_is_checked(field: str, value: int) -> None:
    model = architecture(config_of("llama", **{field: value}))
    check_layout(model, tp=2, pp=3, vpp=1, cp=8)
    with pytest.raises(ConfigError, match=f"tp = 4 does not divide the model's {field} = {value}") as caught:
        check_layout(model, tp=4, pp=1, vpp=1, cp=1)
    assert "tp may be 1, 2 for this model" in str(caught.value)
