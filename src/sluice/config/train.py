"""The trainer: optimizer, schedule, memory."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sluice.config.base import Part
from sluice.config.lora import LoraConfig
from sluice.config.megatron import MegatronConfig
from sluice.config.model import DType


class OptimizerConfig(Part):
    """AdamW."""

    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay; matrices only, never norms or biases."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Global gradient norm limit; 0 switches clipping off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Rate at the last step, as a fraction of the peak."""


class TrainConfig(Part):
    """One optimizer step per batch unless the algorithm asks for more."""

    backend: Literal["torch", "megatron"] = "torch"
    """Who computes a step. `torch`: transformers' own modules. `megatron`: Megatron-Core, for models that several
    accelerators share, at each layer too."""
    megatron: MegatronConfig = MegatronConfig()
    """Layout and memory of the Megatron backend."""
    ranks: int = Field(default=1, ge=1)
    """Processes that share the model and every batch, one accelerator each: by FSDP2, or as `megatron` says. The
    result is that of one."""
    rank_seconds: float = Field(default=1_800.0, gt=0)
    """Deadline of one call to all ranks: a step, a scoring pass, a checkpoint."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    micro_batch_tokens: int = Field(default=8_192, ge=1)
    """Token budget of one forward and backward pass; a longer sample is refused with its size."""
    share_prompts: Literal["auto", "always", "never"] = "auto"
    """Compute what samples of a micro-batch begin with in common once: 1.5 to 3.9 times cheaper steps where that was
    measured, on a CPU. `auto` does it there; on an accelerator gradients of shared tokens are added one by one, which
    costs more than short prompts do."""
    logprob_chunk: int = Field(default=2_048, ge=1)
    """Tokens whose logits exist at one time; peak memory is chunk x vocabulary, whatever the batch."""
    dtype: DType = "float32"
    """Precision of the forward and backward pass. Parameters and moments stay in float32."""
    compile: bool | None = None
    """Have `torch.compile` make one kernel of many small operations: log-probs, and with the Megatron backend norms,
    rotary embedding and activations. None does on an accelerator. It needs a C compiler there."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    routing_replay: bool = False
    """Train tokens through the experts that sampled them, as an SGLang engine recorded them
    (`rollout.sglang.routed_experts`); mixture-of-experts models only."""
    lora: LoraConfig | None = None
    """Train adapters only, on one rank and in float32; None trains every parameter."""

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        if self.backend == "torch":
            if self.megatron != MegatronConfig():
                raise ValueError(
                    "train.megatron is read with train.backend = 'megatron' (--trainer megatron); set it, or leave "
                    "train.megatron out"
                )
            return self
        for name, value in (("lora", self.lora is not None), ("routing_replay", self.routing_replay)):
            if value:
                raise ValueError(f"train.{name} is not there with train.backend = 'megatron'; leave one of them out")
        if self.share_prompts == "always":
            raise ValueError(
                "train.share_prompts = 'always' is not there with train.backend = 'megatron'; set 'auto', or "
                "train.backend = 'torch'"
            )
        layout = self.megatron
        for name in ("recompute", "recompute_layers"):
            if getattr(layout, name) != getattr(MegatronConfig(), name) and not self.activation_checkpointing:
                raise ValueError(
                    f"train.megatron.{name} says what train.activation_checkpointing computes again, and that is off; "
                    "set it to true"
                )
        if layout.gradients == "bfloat16" and self.dtype == "float32":
            raise ValueError(
                "train.megatron.gradients = 'bfloat16' rounds gradients of a pass that is made in float32; set "
                "train.dtype = 'bfloat16', or leave it out"
            )
        if self.ranks % layout.replica:
            raise ValueError(
                f"train.ranks = {self.ranks} is no multiple of {layout.replica}, the ranks of one replica: "
                f"train.megatron.tp {layout.tp} x cp {layout.cp} x pp {layout.pp}"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        if self.lora is None:
            return self
        if self.dtype != "float32":
            raise ValueError(
                "train.lora: engines get merged weights, and in bfloat16 an adapter's share would be rounded away; set "
                "train.dtype = 'float32'"
            )
        if self.ranks > 1:
            raise ValueError("train.lora trains on one rank: set train.ranks = 1")
        if self.routing_replay:
            raise ValueError("train.lora with train.routing_replay is not supported; leave one of them out")
        return self
