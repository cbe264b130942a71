"""Tiny random models of the families that the tests of trainer and embedded engine share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from tests.unit.train_cases import scratch
from transformers import AutoModelForCausalLM

_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GROUPED: dict[str, Any] = {
    **_MOE, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "head_dim": 8,
}  # fmt: skip
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "llama": {},
    "qwen2": {},
    "qwen3_moe": {**_MOE, "num_experts": 6, "norm_topk_prob": True},
    "glm4": {},
    "glm4_moe": {**_GROUPED, "use_qk_norm": True},
    "deepseek_v3": {**_GROUPED, **_LATENT},
}
"""What trainer and embedded engine both run. Keys and values of deepseek_v3 differ in size."""
MOE = ("qwen3_moe", "glm4_moe", "deepseek_v3")
ONE_AT_A_TIME: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, **_LAYERS},
    "gpt_oss": {
        **_LAYERS, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm_moe_dsa": {**_GROUPED, **_LATENT, "index_topk": 4, "index_n_heads": 32, "index_head_dim": 16},
    "qwen3_next": {
        "num_experts": 4, **_MOE, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip
"""What the trainer runs sample by sample, and the embedded engine refuses."""


def family(folder: Path, name: str, **changes: Any) -> Path:
    """A model of the family in `folder`; initial weights are larger than usual, so that errors show."""
    given = {**FAMILIES, **ONE_AT_A_TIME}[name]
    return scratch(
        folder, **{"tie_word_embeddings": False, "initializer_range": 0.1, **given, **changes}, model_type=name
    )


def hashed(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights that the name of a tensor decides: norms around 1, all else around 0, standard deviation 0.08."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.08
    return found + 1 if name.endswith("norm.weight") else found


def even(folder: Path, vocabulary: int = 52) -> Path:
    """The model of `folder` with a vocabulary that ranks can divide, and `hashed` weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(hashed(name, parameter.shape))
    model.save_pretrained(folder)
    return folder
