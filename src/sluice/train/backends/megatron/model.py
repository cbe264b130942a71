"""The model of one rank: its stages of the pipeline, built by megatron-core from specs, with our modules where it
needs Transformer Engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from sluice.train.backends.megatron.attention import PackedAttention
from sluice.train.backends.megatron.division import context_group, tensor_group
from sluice.train.backends.megatron.families import Architecture
from sluice.train.backends.megatron.norm import Norm
from sluice.train.backends.megatron.packs import Packed
from sluice.train.backends.megatron.settings import Settings
from sluice.train.logprob import TokenScores, token_scores


def normed(projection: Any) -> Any:
    """The class of a projection back to the residual stream with a norm after it, as in GLM-4.

    Args:
        projection: a row-parallel linear class of megatron-core's.
    """

    class Normed(projection):
        def __init__(self, input_size: int, output_size: int, *, config: Settings, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            self.post_norm = Norm(config, output_size, eps=config.layernorm_epsilon)

        def forward(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(*arguments)
            return self.post_norm(output), bias

    return Normed


class ScoringHead(ColumnParallelLinear):
    """The output layer, which yields scores of chosen tokens. It is called as a module: what fetches updated parameters
    hooks into that."""

    def forward(self, states: Tensor, weight: Tensor | None, pack: Packed, chunk: int) -> TokenScores:  # pyright: ignore
        """Scores of this rank's tokens.

        Args:
            states: from which they are predicted, `[mine, hidden]`.
            weight: of the embedding, where it is the head; None takes the layer's own.
            chunk: tokens whose logits exist at one time.
        """
        group = tensor_group()
        return token_scores(
            states,
            cast(Tensor, self.weight) if weight is None else weight,
            None,
            pack.targets,
            pack.temperature,
            chunk=chunk,
            over=group if group.size() > 1 else None,
            compiled=cast(Settings, self.config).compile_small,
        )


class ValueHead(torch.nn.Module):
    """One float32 output, from zero, the same at every tensor-parallel rank."""

    def __init__(self, config: Settings) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(1, device=device))

    def forward(self, states: Tensor) -> Tensor:
        """`[mine, hidden]` to values `[mine]`."""
        return F.linear(states.to(self.weight.dtype), self.weight, self.bias).squeeze(1)


class PackedGPT(GPTModel):
    """Runs on packs and yields scores or values of chosen tokens, never logits.

    A stage before the last yields hidden states.
    """

    def __init__(self, options: Settings, *arguments: Any, chunk: int, values: bool, **further: Any) -> None:
        super().__init__(options, *arguments, **further)
        self._chunk = chunk
        self._values = values
        if self.post_process and values:
            self.output_layer: Any = ValueHead(options)
        elif self.post_process:
            self.output_layer.__class__ = ScoringHead  # GPTModel names the class that it builds

    def forward(self, pack: Packed) -> Tensor | TokenScores:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[local, 1, hidden]`, or at the last stage scores of all tokens of `pack.index`, in their order."""
        states = self.embedding(input_ids=pack.ids, position_ids=None) if self.pre_process else None
        if states is not None and pack.still is not None:
            states = torch.where(pack.still, states.detach(), states)
        states = self.decoder(hidden_states=states, attention_mask=None, packed_seq_params=pack)
        if not self.post_process:
            return states
        chosen = self._whole(states).index_select(0, pack.rows)
        if self._values:
            values = _joined(self.output_layer(chosen), pack)
            return TokenScores(values, torch.zeros_like(values))
        tied = self.shared_embedding_or_output_weight() if self.output_layer.weight is None else None
        return TokenScores(*(_joined(own, pack) for own in self.output_layer(chosen, tied, pack, self._chunk)))

    def _whole(self, states: Tensor) -> Tensor:
        """`[local, hidden]` of all tokens of this context-parallel rank.

        The gradient is summed over tensor-parallel ranks where each has a share of it: under a divided vocabulary.
        """
        if self.config.sequence_parallel:
            states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=not self._values)
        elif not self._values:
            states = copy_to_tensor_model_parallel_region(states)
        return states.squeeze(1)

    def whole_names(self) -> Iterator[str]:
        """The names of this stage's parameters, with the numbers that layers have in the whole model, from 0."""
        layers: Any = self.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        for name, _ in self.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + offset)
            yield ".".join(parts)


def _joined(values: Tensor, pack: Packed) -> Tensor:
    """Values of the tokens of all context-parallel ranks, of which each computes the whole loss and sends back its own
    share of the gradient."""
    group = context_group()
    if group.size() == 1:
        return values
    padded = F.pad(values, (0, max(pack.counts) - len(values)))
    return _Gathered.apply(padded, group).index_select(0, pack.order)


class _Gathered(torch.autograd.Function):
    """The parts of all ranks end to end. Every rank computes the same from them, so a gradient is not summed."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = group.rank(), len(part)
        whole = part.new_empty(group.size() * len(part))
        torch.distributed.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.rank * ctx.size : (ctx.rank + 1) * ctx.size], None


def build_stages(architecture: Architecture, options: Settings, *, chunk: int, values: bool) -> list[PackedGPT]:
    """This rank's stages, with the random weights that megatron-core gives them.

    Args:
        chunk: tokens whose logits exist at one time.
        values: the last stage ends in a `ValueHead`.
    """
    virtual = options.virtual_pipeline_model_parallel_size
    stages: list[PackedGPT] = []
    for number in range(virtual or 1):
        vp_stage = number if virtual else None
        stages.append(
            PackedGPT(
                options,
                _specs(architecture, options, vp_stage),
                architecture.vocabulary,
                architecture.config.max_position_embeddings,
                position_embedding_type="none",  # it is our attention's
                share_embeddings_and_output_weights=architecture.tied and not values,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
                chunk=chunk,
                values=values,
            )
        )
    return stages


def _specs(architecture: Architecture, options: Settings, vp_stage: int | None) -> TransformerBlockSubmodules:
    block = get_gpt_decoder_block_spec(
        options, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    block.layer_norm = cast(Any, Norm)
    column, row = linear_classes(options)
    for spec in cast(list[Any], block.layer_specs):
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = Norm
        attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
        attention.core_attention = PackedAttention
        attention.linear_qkv = mlp.linear_fc1 = column
        attention.linear_proj = mlp.linear_fc2 = normed(row) if architecture.post_norms else row
        if architecture.qk_norm:
            attention.q_layernorm = attention.k_layernorm = Norm
    return block


def linear_classes(options: Settings) -> tuple[Any, Any]:
    """Column- and row-parallel linear layers: megatron-core's own, or Transformer Engine's, which know FP8."""
    if not options.transformer_engine:
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear
