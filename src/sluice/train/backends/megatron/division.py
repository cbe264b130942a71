"""The process groups that megatron-core divides the ranks into."""

from __future__ import annotations

from typing import cast

from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from sluice.config.megatron import MegatronConfig


def divide(chosen: MegatronConfig, *, seed: int) -> None:
    """Divide the default process group anew; a call of all ranks.

    Args:
        seed: of random states.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        chosen.tp, chosen.pp, chosen.vpp if chosen.vpp > 1 else None, context_parallel_size=chosen.cp
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def tensor_group() -> ProcessGroup:
    """Ranks that share this rank's matrices."""
    return cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def context_group() -> ProcessGroup:
    """Ranks that share the tokens of this rank's samples."""
    return cast(ProcessGroup, parallel_state.get_context_parallel_group())


def pipeline_group() -> ProcessGroup:
    """Ranks that hold the other layers."""
    return cast(ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def holders_group() -> ProcessGroup:
    """Ranks that hold the same parts of the model, on other samples or other tokens of them."""
    return cast(ProcessGroup, parallel_state.get_data_parallel_group(with_context_parallel=True))
