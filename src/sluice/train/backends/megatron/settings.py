"""megatron-core's configuration, from a model and a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from sluice.config.train import TrainConfig
from sluice.train.backends.megatron.families import Architecture


@dataclass
class Settings(TransformerConfig):
    """megatron-core's configuration, with what our modules look up in it."""

    compile_small: bool = False
    interleaved: bool = False
    attention_kernel: Literal["auto", "cudnn", "flash", "varlen"] = "auto"
    transformer_engine: bool = False


def settings(architecture: Architecture, config: TrainConfig, device: torch.device) -> Settings:
    """megatron-core's configuration of a model."""
    chosen, dtype = config.megatron, getattr(torch, config.dtype)
    fast = device.type != "cpu"
    compiled = fast if config.compile is None else config.compile
    return Settings(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.groups,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.eps,
        qk_layernorm=architecture.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        persist_layer_norm=False,
        bias_activation_fusion=fast and compiled,
        bias_dropout_fusion=fast and compiled,
        use_cpu_initialization=not fast,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # gradients are sums over ranks and passes
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default is refused with variable lengths, for dense models too
        tensor_model_parallel_size=chosen.tp,
        sequence_parallel=chosen.sequence_parallel if chosen.sequence_parallel is not None else chosen.tp > 1,
        pipeline_model_parallel_size=chosen.pp,
        virtual_pipeline_model_parallel_size=chosen.vpp if chosen.vpp > 1 else None,
        context_parallel_size=chosen.cp,
        # The defaults interleave two stages silently wrong: two sends of a pair of ranks are matched in wrong order.
        overlap_p2p_comm=chosen.vpp > 1,
        batch_p2p_comm=chosen.vpp <= 1,
        **_recompute(config, architecture.layers // (chosen.pp * chosen.vpp)),
        compile_small=compiled,
        transformer_engine=chosen.transformer_engine,
        fp8=chosen.fp8,
        interleaved=architecture.rotary_interleaved,
        attention_kernel=chosen.attention,
    )


def _recompute(config: TrainConfig, layers: int) -> dict[str, Any]:
    """What is computed again in the backward pass.

    Args:
        layers: of one stage.
    """
    chosen = config.megatron
    if not config.activation_checkpointing:
        return {}
    if chosen.recompute == "layers":
        some = chosen.recompute_layers
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform" if some is None else "block",
            "recompute_num_layers": 1 if some is None else min(some, layers),
        }
    return {
        "recompute_granularity": "selective",
        "recompute_modules": ["mlp" if chosen.recompute == "mlp" else "core_attn"],
    }
