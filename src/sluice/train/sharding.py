"""One model over several ranks: FSDP2, so that every rank holds a part of each parameter, gradient and moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sluice.errors import TrainError


class Whole(nn.Module):
    """Runs any computation with a sharded model as if it were the model's forward pass.

    Log-probs need the layers and the head's weight, but never the model's own `forward`, which makes logits. FSDP
    gathers parameters around a module's `forward`: here it is the computation that is handed in.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return work()


class Shards:
    """All ranks of the default process group, in one dimension.

    Args:
        device: `cpu` or `cuda`.
        dtype: in which a sharded model computes; gradients are reduced in float32.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.mesh: DeviceMesh = init_device_mesh(device, (dist.get_world_size(),))
        self._dtype = dtype

    @property
    def world(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def wrap(self, model: PreTrainedModel) -> Whole:
        """Shard `model` in place, a decoder layer at a time; what is left is gathered for the whole pass.

        The model may lie on the CPU: each part is moved to this rank's device as it is sharded, so that the device
        never holds the whole.

        Raises:
            TrainError: the model has no layers that can be sharded one by one.
        """
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise TrainError(
                f"{type(model).__name__} has no layers that can be sharded",
                hint="train this model with train.ranks = 1",
            )
        policy = MixedPrecisionPolicy(
            param_dtype=None if self._dtype == torch.float32 else self._dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        whole = Whole(model)
        for module in (*layers, whole):
            sharded = fully_shard(module, mesh=self.mesh, mp_policy=policy)
            assert isinstance(sharded, FSDPModule)
            _add_up(sharded)
        return whole


def rest(whole: Whole) -> None:
    """Let go of what the root keeps gathered from a forward pass on to its backward pass.

    After a pass without gradient there is no such end: the memory would stay taken, and what is loaded into the
    model would go to the gathered copy and be lost.
    """
    assert isinstance(whole, FSDPModule)
    whole.reshard()


def _add_up(module: FSDPModule) -> None:
    """Gradients are sums over the ranks: a token's loss is scaled by counts of the whole step already."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has neither a mean nor a scaled sum
    if hasattr(module, "set_reduce_scatter_unused_params"):  # a parameter that one rank did not reach, others did
        module.set_reduce_scatter_unused_params(True)  # pyright: ignore[reportCallIssue]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor. A collective call where it is sharded: every rank makes it, in the same order.

    A part in host memory passes through the ranks' device, which is where they meet.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    there = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(there, DTensor)
    return there.full_tensor()


def apart(whole: Tensor, tensor: Tensor) -> Tensor:
    """`whole`, which is all of `tensor`, in host memory that is not the tensor's own: copied once, on the way there."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if whole.device.type != "cpu":
        return whole.cpu()
    return whole.clone() if whole.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() else whole


def on_host(tensor: Tensor, *, copy: bool) -> Tensor:
    """The whole of a tensor in host memory; nothing of it at the ranks behind the first. Collective as `gathered` is.

    Args:
        copy: never in memory that the tensor itself has.
    """
    whole = gathered(tensor.detach())
    if isinstance(tensor, DTensor) and dist.get_rank():
        return torch.empty(0, dtype=whole.dtype)
    return apart(whole, tensor) if copy else whole.cpu()


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's part of a whole `tensor`, laid out and placed as `other` is. No communication."""
    if not isinstance(other, DTensor):
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one parameter."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return id(local.untyped_storage()) if local.numel() == 0 else local.data_ptr(), tensor.shape
