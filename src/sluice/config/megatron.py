"""The Megatron backend: how a model lies over ranks, and what is kept, computed again or left on the host."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sluice.config.base import Part


class MegatronConfig(Part):
    """Megatron-Core 0.16 under `train.backend = "megatron"`; needs `sluice-rl[megatron]`.

    `train.ranks` is shared out as tp x cp x pp ranks to each replica of the model; what is left over divides the batch.
    """

    tp: int = Field(default=1, ge=1)
    """Ranks that share every layer's matrices (tensor parallel); it divides the model's heads and its vocabulary."""
    pp: int = Field(default=1, ge=1)
    """Ranks that share the layers (pipeline parallel), one block of them each."""
    vpp: int = Field(default=1, ge=1)
    """Blocks of layers at each rank of a pipeline (virtual stages): less idle time, more messages."""
    cp: int = Field(default=1, ge=1)
    """Ranks that share the tokens of every sample (context parallel), for long samples."""
    sequence_parallel: bool | None = None
    """Share what lies between a layer's matrices by tokens over the `tp` ranks; None does where `tp` is over 1."""
    distributed_optimizer: bool = True
    """Divide float32 parameters and moments over the replicas; false keeps all of a rank's at each."""
    overlap: bool = True
    """Add gradients up and gather parameters while layers compute."""
    recompute: Literal["layers", "mlp", "attention"] = "layers"
    """What `train.activation_checkpointing` computes again: whole layers, or one half of each."""
    recompute_layers: int | None = Field(default=None, ge=1)
    """Layers at each rank that are computed again, from its first; None is all of them. The others keep what they
    computed, which takes more memory and less time."""
    offload_optimizer: float = Field(default=0.0, ge=0, le=1)
    """Share of moments that stay in host memory, where the CPU updates them: 8 bytes a parameter less on the
    accelerator, and 16 there. Refused where ranks have no accelerator."""
    attention: Literal["auto", "cudnn", "flash", "varlen"] = "auto"
    """Kernel on an accelerator. `cudnn` and `flash` take samples of similar length together, `varlen` a pack at once.
    `auto` is `cudnn` for samples of 4,096 tokens and more. With `cp` over 1 it is always `varlen`."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """In which gradients are added up. An update makes float32 copies of those that a rank updates: `bfloat16` takes
    less memory where three replicas or more share the updates, and more where there is one."""

    transformer_engine: bool = False
    """Take Transformer Engine's linear layers, where it is installed; attention and norms stay Sluice's own. No machine
    at hand has it: this was not run."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Number format of Transformer Engine's matrix products; None is that of `train.dtype`. Not run either."""

    @property
    def replica(self) -> int:
        """Ranks of one replica of the model."""
        return self.tp * self.cp * self.pp

    @property
    def divides_sequences(self) -> bool:
        """`sequence_parallel`, resolved."""
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "sequence_parallel = true shares tokens over the ranks of tp, and tp = 1; set tp, or leave it out"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp = {self.vpp} divides the stages of a pipeline, and pp = 1 has none; set pp")
        if self.offload_optimizer and not self.distributed_optimizer:
            raise ValueError(
                f"offload_optimizer = {self.offload_optimizer} is not there with distributed_optimizer = false; leave "
                "one of them out"
            )
        if self.fp8 is not None and not self.transformer_engine:
            raise ValueError(
                f"fp8 = {self.fp8!r} is Transformer Engine's: set transformer_engine = true, or leave it out"
            )
        if self.recompute_layers is not None and self.recompute != "layers":
            raise ValueError(
                f"recompute_layers counts whole layers, and recompute = {self.recompute!r} computes a half of each "
                "again; leave one of them out"
            )
        return self
