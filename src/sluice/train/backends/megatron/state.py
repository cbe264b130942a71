"""The optimizer's state as whole tensors under the names of a checkpoint, whatever the layout that holds it.

It is the torch backend's state: `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME`. So a run goes on
with other numbers of tensor, pipeline, context and data-parallel ranks, and under the other backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sluice.train.backends.megatron.division import holders_group
from sluice.train.backends.megatron.families import Parameter
from sluice.train.backends.megatron.owned import Own, first_replica, gathered_parts, on_host, writes

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
Read = Callable[[str, Parameter], Tensor]
"""This tensor rank's part of one kind of state of a parameter, float32."""
Masters = Callable[[Parameter], bool]


@dataclass(frozen=True, slots=True)
class _Piece:
    """What this rank's optimizer holds of one parameter.

    Attributes:
        where: in the flattened part that the model holds.
        main: its float32 values.
        states: of the optimizer, by main parameter.
    """

    where: slice
    main: Tensor
    states: dict[Tensor, dict[str, Any]]

    def take(self, kind: str) -> Tensor:
        return (self.main if kind == MASTER else self.states[self.main][kind]).detach()


def _place(optimizers: Sequence[Any], parameter: torch.nn.Parameter) -> tuple[Any, slice, Tensor] | None:
    """The optimizer that updates a parameter, which part of it, and that part's main values; None where other replicas
    update all of it."""
    for each in optimizers:
        if hasattr(each, "model_param_group_index_map"):  # divided over replicas
            if parameter in each.model_param_group_index_map:
                group, order = each.model_param_group_index_map[parameter]
                found = each._get_model_param_range_map(parameter)["param"]
                main = each.optimizer.param_groups[group]["params"][order]
                return each, slice(found.start, found.end), main
        else:
            main = getattr(parameter, "main_param", parameter)
            if any(main is known for group in each.optimizer.param_groups for known in group["params"]):
                return each, slice(0, parameter.numel()), main
    return None


def _piece(optimizers: Sequence[Any], parameter: torch.nn.Parameter) -> _Piece | None:
    found = _place(optimizers, parameter)
    if found is None:
        return None
    each, where, main = found
    return _Piece(where, *_inner(each.optimizer, main))


@torch.no_grad()
def set_main(optimizers: Sequence[Any], parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Make `value` the main values of a parameter, as far as this rank updates it.

    Args:
        value: in the shape of the parameter, not rounded to its dtype.
    """
    if (found := _place(optimizers, parameter)) is not None:
        _, where, main = found
        main.copy_(value.reshape(-1)[where].view(main.shape))


def _inner(optimizer: Any, main: Tensor) -> tuple[Tensor, dict[Tensor, dict[str, Any]]]:
    """Float32 values and states, from where they are updated: `offload_optimizer` keeps them in optimizers of its own,
    and overwrites what is told to it alone."""
    if not hasattr(optimizer, "param_to_inner_param"):
        return main, optimizer.state
    inner = optimizer.param_to_inner_param[main]
    for each in optimizer.sub_optimizers:
        if any(inner is known for group in each.param_groups for known in group["params"]):
            return inner, each.state
    raise AssertionError("every parameter is updated by one optimizer")


@torch.no_grad()
def whole_state(
    optimizers: Sequence[Any],
    held: Sequence[Own],
    *,
    steps_done: int,
    masters: Masters,
    divided: bool,
    there: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """This rank's stages; a call of all ranks. In host memory of their own, at the ranks that write; else empty.

    Args:
        optimizers: those that megatron-core chains.
        steps_done: updates so far; there are moments after the first.
        masters: which parameters' main values are not the model's own.
        divided: each replica holds a part.
        there: gives a tensor as it is on the device, where it may be away from.
    """
    found: dict[str, Tensor] = {}
    for own in (own for own in held if not own.tied):
        mine = _piece(optimizers, own.part)
        for kind in (*((MASTER,) if masters(own.described) else ()), *(MOMENTS if steps_done else ())):
            part = _joined(own.part, mine, mine and there(mine.take(kind)), divided=divided)
            if first_replica():
                every = gathered_parts(part)
                if writes():
                    found |= {f"{kind}/{name}": on_host(tensor) for name, tensor in own.whole(every)}
        if steps_done and writes():
            found |= {f"step/{name}": torch.tensor(float(steps_done)) for name in own.described.tensors}
    return found


def _joined(part: Tensor, mine: _Piece | None, value: Tensor | None, *, divided: bool) -> Tensor:
    """At the first replica what all of them hold, in the shape of the part that the model holds."""
    whole = torch.zeros(part.numel(), dtype=torch.float32, device=part.device)
    if mine is not None and value is not None:
        whole[mine.where] = value.reshape(-1).to(whole.device)
    group = holders_group()
    if divided and group.size() > 1:
        dist.reduce(whole, group=group, group_dst=0)
    return whole.view(part.shape)


@torch.no_grad()
def restore_state(
    optimizers: Sequence[Any], held: Sequence[Own], read: Read, *, steps_done: int, masters: Masters
) -> None:
    """Inverse of `whole_state`, at this rank alone; the model's own parameters are loaded before.

    Args:
        read: gives this rank's part of what was saved.
    """
    for own in held:
        mine = _piece(optimizers, own.part)
        if mine is None:
            continue

        def taken(kind: str, mine: _Piece = mine, own: Own = own) -> Tensor:
            return read(kind, own.described).reshape(-1)[mine.where].to(mine.main.device).view(mine.main.shape)

        if masters(own.described):
            mine.main.copy_(taken(MASTER))
        mine.states.pop(mine.main, None)
        if steps_done:
            moments = {kind: taken(kind).clone() for kind in MOMENTS}
            step = torch.tensor(float(steps_done), device=mine.main.device)
            mine.states[mine.main] = {"step": step, **moments}
