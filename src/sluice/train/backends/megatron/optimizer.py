"""megatron-core's optimizer under our schedule: main parameters, moments, gradients, divided over replicas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as CoreConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from sluice.config.train import OptimizerConfig, TrainConfig
from sluice.train.backends.megatron.division import holders_group
from sluice.train.backends.megatron.model import PackedGPT, Settings
from sluice.train.schedule import learning_rate


def wrap(stages: Sequence[PackedGPT], options: Settings, config: TrainConfig) -> list[DistributedDataParallel]:
    """The stages with their parameters and gradients in buffers that replicas sum and share."""
    chosen = config.megatron
    overlap = _overlaps(config)
    return [
        DistributedDataParallel(
            options,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=chosen.gradients == "float32",
                use_distributed_optimizer=chosen.distributed_optimizer,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap and chosen.distributed_optimizer,
            ),
            stage,
            disable_bucketing=number > 0,  # later virtual stages reduce while earlier ones still compute
        )
        for number, stage in enumerate(stages)
    ]


def _overlaps(config: TrainConfig) -> bool:
    """Whether anything is sent that layers could hide: what waits for it is called at every module."""
    return config.megatron.overlap and holders_group().size() > 1


class CoreOptimizer:
    """Steps, clips and counts.

    Args:
        config: of the optimizer, for rates and clipping.
        train: for precision and for what is divided.
        chunks: what `wrap` returned.
        total_steps: where the schedule ends.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        train: TrainConfig,
        chunks: Sequence[DistributedDataParallel],
        *,
        total_steps: int,
    ) -> None:
        chosen = train.megatron
        self._config = config
        self._chunks: list[Any] = list(chunks)
        self._total_steps = total_steps
        self._divided = chosen.distributed_optimizer
        self.steps_done = 0
        core = CoreConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=0.0,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=train.dtype == "bfloat16",
            params_dtype=getattr(torch, train.dtype),
            use_distributed_optimizer=chosen.distributed_optimizer,
            overlap_param_gather=_overlaps(train) and chosen.distributed_optimizer,
            optimizer_cpu_offload=chosen.offload_optimizer > 0,
            optimizer_offload_fraction=chosen.offload_optimizer,
            use_torch_optimizer_for_cpu_offload=True,
        )
        self.core: Any = get_megatron_optimizer(core, self._chunks, get_standard_config_overrides(core))
        self._settled = True
        for group in self.core.param_groups:
            group["fused"], group["foreach"] = True, False
            group["weight_decay"] = config.weight_decay * group["wd_mult"]  # megatron-core leaves it to its scheduler

    @property
    def next_lr(self) -> float:
        """Rate of the next update."""
        return learning_rate(self._config, self.steps_done, self._total_steps)

    @property
    def parts(self) -> list[Any]:
        """The optimizers that megatron-core chains."""
        return list(getattr(self.core, "chained_optimizers", [self.core]))

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.core.zero_grad()

    def grad_norm(self) -> float:
        """Global L2 norm of the gradients that were added up; a call of all ranks."""
        self.core.prepare_grads()
        return float(self.core.get_grad_norm())

    def update(self, norm: float) -> float:
        """Clip by the norm that `grad_norm` returned, update, and return the rate that was used."""
        if self._config.clip_grad:
            for part in self.parts:
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, self._config.clip_grad, norm)
        rate = self.next_lr
        for group in self.core.param_groups:
            group["lr"] = rate
        self.core.step_with_ready_grads()
        self._settled = False
        self.steps_done += 1
        return rate

    def settle(self) -> None:
        """Have every replica hold all updated parameters: overlapped, they are fetched only as a training pass runs."""
        if self._settled or not self._divided:
            return
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)
        self._settled = True

    @torch.no_grad()
    def reload_copies(self) -> None:
        """After main values were set: `offload_optimizer` updates copies, which were made with the model."""
        for part in self.parts:
            for main, inner in getattr(part.optimizer, "param_to_inner_param", {}).items():
                if inner is not main:
                    inner.copy_(main)

    def tensors(self) -> Iterable[Tensor]:
        """What it holds besides the model's own parameters: main parameters and moments."""
        for part in self.parts:
            for group in part.param_groups:
                for main in group["params"]:
                    yield main
                    yield from (v for v in part.state.get(main, {}).values() if torch.is_tensor(v))
