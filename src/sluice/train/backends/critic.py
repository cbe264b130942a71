"""The critic on the torch backend: the policy's architecture with a scalar head, in one process.

Its layers start from the policy's first weights, its head from zero, so that every value is 0 before the
first update. It has an optimizer of its own. The value at a token is read off the state that predicts the
token, one position before: it does not know the token itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sluice.config.critic import CriticConfig
from sluice.config.train import TrainConfig
from sluice.errors import CheckpointError
from sluice.models.build import load_model
from sluice.models.heads import backbone, output_head
from sluice.train.attention import PACKED_ATTENTION
from sluice.train.backends.offload import HostMemory
from sluice.train.backends.optimizer import MasterOptimizer
from sluice.train.backends.snapshot import state_writer
from sluice.train.backends.state import read_state
from sluice.train.backends.torch import checkpoint_activations
from sluice.train.backends.updating import step_gradients, take_step
from sluice.train.base import CriticStats, Loss, ValueLoss, Writer
from sluice.train.logprob import TokenScores
from sluice.train.packed_model import Pack, choose_attention, make_pack, predicting_states, shares_prompts
from sluice.train.packing import assign_groups, check_fit
from sluice.train.sharding import on_host
from sluice.train.totals import StepTotals, run_loss
from sluice.types import LossInputs, LossOutput, MicroBatch, TrainBatch, TrainSample, ValueInputs

WEIGHT = "weight"
"""First part of the names of weights among the tensors of a critic's state; optimizer's have others."""


class ValueModel(torch.nn.Module):
    """A backbone and a linear head of one output, which is float32."""

    def __init__(self, layers: torch.nn.Module, head: torch.nn.Linear) -> None:
        super().__init__()
        self.layers = layers
        self.head = head

    @property
    def attention(self) -> str:
        """The attention implementation of its layers."""
        config: Any = self.layers.config
        return str(config._attn_implementation)

    def values(self, pack: Pack) -> Tensor:
        """Values before the tokens in `pack.index`, shape `[scored]`."""
        states = predicting_states(self.layers, pack)
        return self.head(states.to(self.head.weight.dtype)).squeeze(1)


class TorchCritic:
    """Implements `train.base.Critic`.

    Args:
        config: its optimizer.
        train: precision and memory.
        model_folder: Hugging Face folder of the policy's first weights.
        total_steps: updates of the critic over the run, for its schedule.
        device: where parameters live.
    """

    def __init__(
        self,
        config: CriticConfig,
        train: TrainConfig,
        model_folder: Path,
        *,
        total_steps: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._train = train
        self._device = torch.device(device)
        self._host = HostMemory(self._device)
        self._share = shares_prompts(train.share_prompts, self._device)
        exact = _value_model(model_folder, train, torch.float32, None)
        attention = exact.attention
        model = exact if train.dtype == "float32" else _value_model(model_folder, train, torch.bfloat16, attention)
        self.model = model.to(self._device)
        parameters = dict(self.model.named_parameters())
        wide = dict(exact.named_parameters())
        masters = {name: wide[name].detach() for name, p in parameters.items() if p.dtype != torch.float32}
        self.optimizer = MasterOptimizer(config.optimizer, parameters, masters, total_steps=total_steps)

    @torch.no_grad()
    def score(self, samples: Sequence[TrainSample]) -> list[TrainSample]:
        """See `Critic.score`."""
        budget = self._train.micro_batch_tokens
        check_fit(samples, budget)
        filled = list(samples)
        for members in assign_groups(samples, budget):
            micro = MicroBatch(tuple(samples[i] for i in members), np.zeros(sum(len(samples[i]) for i in members)))
            scored = (micro.stream("version") >= 0) | (micro.stream("weight") > 0)
            values = np.zeros(micro.num_tokens, np.float32)
            if scored.any():
                values[scored] = (
                    self.model.values(make_pack(micro, scored, self._device, share=self._share)).float().cpu().numpy()
                )
            for index, part in zip(members, np.split(values, micro.cu_seqlens[1:-1]), strict=True):
                filled[index] = samples[index].with_streams(value=part)
        return filled

    def step(self, batch: TrainBatch, loss: ValueLoss) -> CriticStats:
        """See `Critic.step`."""
        if not any(sample.num_trained_tokens for sample in batch.samples):
            return CriticStats(0.0, 0.0, self.optimizer.next_lr, {})
        stats = take_step(self.optimizer, lambda: self._backward(batch, loss))
        return CriticStats(stats.loss, stats.grad_norm, stats.lr, stats.metrics)

    def gradients(self, batch: TrainBatch, loss: ValueLoss) -> dict[str, Tensor]:
        """The gradient of the step's loss by parameter name, before clipping. For tests and inspection."""
        return step_gradients(self.optimizer, lambda: self._backward(batch, loss))

    def _backward(self, batch: TrainBatch, loss: ValueLoss) -> StepTotals:
        totals = StepTotals(batch)
        for micro in batch.micro_batches:
            trained = micro.stream("weight") > 0
            if not trained.any():
                continue
            packed = make_pack(micro, trained, self._device, share=self._share)
            values = self.model.values(packed)
            scores = TokenScores(values, torch.zeros_like(values))
            result = run_loss(micro, packed, scores, over_values(loss), totals.streams)
            result.loss.backward()
            totals.add(micro, result)
        return totals

    def offload(self) -> None:
        """See `Critic.offload`."""
        self.optimizer.zero_grad()
        self._host.take(self._tensors())

    def onload(self) -> None:
        """See `Critic.onload`."""
        self._host.give_back(self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        yield from (*self.model.parameters(), *self.model.buffers(), *self.optimizer.tensors())

    def snapshot(self, *, copy: bool = True) -> Writer:
        """See `Critic.snapshot`."""
        weights = {f"{WEIGHT}/{name}": on_host(p, copy=copy) for name, p in self.model.named_parameters()}
        return state_writer({**self.optimizer.state(copy=copy), **weights}, self.optimizer.steps_done)

    def save_state(self, folder: Path) -> None:
        """See `Critic.save_state`."""
        self.snapshot(copy=False)(folder)

    @torch.no_grad()
    def load_state(self, folder: Path) -> None:
        """See `Critic.load_state`."""
        tensors, steps_done = read_state(folder)
        weights = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{WEIGHT}/")}
        for name, parameter in self.model.named_parameters():
            saved = weights.get(f"{WEIGHT}/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise CheckpointError(
                    f"the critic in {folder} has no tensor {name} of shape {tuple(parameter.shape)}",
                    hint="resume with the model the run was started with, or start a new run",
                )
        self.optimizer.load_state(tensors, steps_done)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[f"{WEIGHT}/{name}"])


def _value_model(folder: Path, train: TrainConfig, dtype: torch.dtype, attention: str | None) -> ValueModel:
    """`folder`'s layers in `dtype` under a head of zeros; torch's generator is where it was afterwards.

    `attention` is what `choose_attention` found; None lets it find one.
    """
    causal = load_model(folder, dtype=dtype, attn_implementation=attention or PACKED_ATTENTION)
    if attention is None:
        choose_attention(causal, chunk=train.logprob_chunk, longest=train.micro_batch_tokens)
    if train.activation_checkpointing:
        checkpoint_activations(causal)
    with torch.random.fork_rng(devices=[]):
        head = torch.nn.Linear(output_head(causal).weight.shape[1], 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return ValueModel(backbone(causal), head)


def over_values(loss: ValueLoss) -> Loss:
    """`loss` for the code that runs policy losses: values stand where log-probs do."""

    def over_values(inputs: LossInputs) -> LossOutput:
        return loss(
            ValueInputs(
                values=inputs.logprobs,
                streams=inputs.streams,
                weight=inputs.weight,
                sequence=inputs.sequence,
                episode=inputs.episode,
                num_sequences=inputs.num_sequences,
            )
        )

    return over_values
