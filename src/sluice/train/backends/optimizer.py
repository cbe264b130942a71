"""AdamW over float32 master parameters, whatever precision the model computes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sluice.config.train import OptimizerConfig
from sluice.errors import CheckpointError
from sluice.train.schedule import learning_rate
from sluice.train.sharding import gathered, like, on_host

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterOptimizer:
    """Owns the float32 parameters, their gradients and moments.

    A parameter that already is float32 is its own master. For a bfloat16 one the master is a copy: its
    gradient is added up in float32 as each backward pass delivers it, and every update is rounded back.

    Args:
        parameters: of the model, by name, each once.
        masters: float32 values of those that are not float32, by the same names.
        total_steps: where the schedule ends.
        rounded: the parameters are float32, but the model computes, and is saved, in another precision.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Mapping[str, torch.nn.Parameter],
        masters: Mapping[str, Tensor],
        *,
        total_steps: int,
        rounded: bool = False,
    ) -> None:
        self._rounded = rounded
        self._config = config
        self._total_steps = total_steps
        self._model = dict(parameters)
        self._masters = {
            name: torch.nn.Parameter(masters[name].to(p.device, torch.float32, copy=True)) if name in masters else p
            for name, p in parameters.items()
        }
        for name in masters:
            parameters[name].register_post_accumulate_grad_hook(_collector(self._masters[name]))
        matrices = [p for p in self._masters.values() if p.ndim >= 2]
        others = [p for p in self._masters.values() if p.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.steps_done = 0

    @property
    def next_lr(self) -> float:
        """Rate of the next update."""
        return learning_rate(self._config, self.steps_done, self._total_steps)

    def zero_grad(self) -> None:
        for parameter in (*self._masters.values(), *self._model.values()):
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Gradients that the backward passes of this step have added up, by parameter name."""
        return {name: p.grad for name, p in self._masters.items() if p.grad is not None}

    def grad_norm(self) -> Tensor:
        """Global L2 norm, a scalar tensor."""
        return gathered(get_total_norm(list(self.gradients().values())))

    @torch.no_grad()
    def update(self, grad_norm: Tensor) -> float:
        """Clip by the norm that `grad_norm()` returned, update, and return the rate that was used."""
        if self._config.clip_grad:
            clip_grads_with_norm_(self._masters.values(), self._config.clip_grad, grad_norm)
        rate = self.next_lr
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._round_back()
        self.steps_done += 1
        return rate

    @torch.no_grad()
    def _round_back(self) -> None:
        for name, parameter in self._model.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])

    def _writes_master(self, name: str) -> bool:
        """Whether the float32 values of a parameter are not in the model's own checkpoint."""
        return self._rounded or self._masters[name] is not self._model[name]

    def tensors(self) -> Iterator[Tensor]:
        """What it holds besides the model's own parameters: masters and moments."""
        for name, master in self._masters.items():
            if master is not self._model[name]:
                yield master
            yield from self._adamw.state.get(master, {}).values()

    def move_moments(self, device: str) -> None:
        """To another device, as new tensors."""
        for state in self._adamw.state.values():
            state.update({key: value.to(device) for key, value in state.items()})

    def state(self, *, copy: bool = False) -> dict[str, Tensor]:
        """Moments, and masters that are not the model's own parameters, as whole CPU tensors by flat names.

        They may share the optimizer's memory, which the next update changes, unless `copy`. With shards a call of all
        ranks, of which only the first gets them.
        """
        tensors: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if self._writes_master(name):
                tensors[f"master/{name}"] = on_host(master, copy=copy)
            if self.steps_done:
                state = self._adamw.state.get(master) or _fresh(master)
                tensors |= {f"{key}/{name}": on_host(value, copy=copy) for key, value in state.items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], steps_done: int) -> None:
        """Inverse of `state`; model parameters are loaded by the caller before.

        Raises:
            CheckpointError: a tensor is missing, too many, or of another shape; nothing was changed.
        """
        expected: dict[str, torch.Size] = {}
        for name, master in self._masters.items():
            if self._writes_master(name):
                expected[f"master/{name}"] = master.shape
            if steps_done:
                expected |= {f"{key}/{name}": master.shape for key in _MOMENTS}
                expected[f"step/{name}"] = torch.Size([])
        for name in sorted(expected.keys() | tensors.keys()):
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            wanted = tuple(expected[name]) if name in expected else "not expected"
            if found != wanted:
                raise CheckpointError(
                    f"optimizer state {name}: the checkpoint has {found}, this trainer wants {wanted}",
                    hint="resume with the model and train.dtype that the checkpoint was written with",
                )
        self._adamw.state.clear()
        for name, master in self._masters.items():
            if self._writes_master(name):
                master.copy_(like(tensors[f"master/{name}"], master))
            if steps_done:
                moments = {key: like(tensors[f"{key}/{name}"].clone(), master) for key in _MOMENTS}
                self._adamw.state[master] = {
                    "step": tensors[f"step/{name}"].to(master.device, copy=True),
                    **moments,
                }
        self._round_back()
        self.steps_done = steps_done


def _fresh(master: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter that no gradient has reached, such as the indexer of sparse attention."""
    return {"step": torch.tensor(0.0), **{key: torch.zeros_like(master) for key in _MOMENTS}}


def _collector(master: torch.nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that moves a fresh bfloat16 gradient into the float32 one of its master."""

    def collect(parameter: Tensor) -> None:
        fresh = parameter.grad
        parameter.grad = None
        if fresh is None:
            return
        if master.grad is None:
            master.grad = fresh.float()
        else:
            master.grad.add_(fresh)

    return collect
