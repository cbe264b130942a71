"""One micro-batch through a loss, and what a step adds up over its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sluice.errors import TrainError
from sluice.train.base import Loss, StepStats, measure_mismatch
from sluice.train.logprob import TokenScores
from sluice.types import LossInputs, MicroBatch, TrainBatch


class Indexed(Protocol):
    """A micro-batch as tensors: `index` are its scored tokens, int64 `[scored]`."""

    @property
    def index(self) -> Tensor: ...


_NAMED_SAMPLES = 5
"""Samples that an error names before it goes on with "and n more"."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroResult:
    """Outcome of one micro-batch; tensors but `loss` carry no gradient.

    Attributes:
        loss: Σ scale · token loss, a float64 scalar with gradient.
        logprobs, entropy, per_token: of the trained tokens, `[trained]`.
        metrics: of the trained tokens, `[trained]` each.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    per_token: Tensor
    metrics: Mapping[str, Tensor]

    def portable(self) -> MicroResult:
        """The same on the CPU, without gradient."""
        return replace(
            self,
            loss=self.loss.detach().cpu(),
            logprobs=self.logprobs.cpu(),
            entropy=self.entropy.detach().cpu(),
            per_token=self.per_token.cpu(),
            metrics={name: values.cpu() for name, values in self.metrics.items()},
        )


def run_loss(
    micro: MicroBatch, packed: Indexed, scores: TokenScores, loss: Loss, streams: frozenset[str]
) -> MicroResult:
    """Hand the micro-batch to `loss` and add up its tokens, each with the scale it was given.

    `scores` are those of the trained tokens, `packed.index`. Only these enter the sum: what a loss returns
    at other tokens, not-a-number included, reaches neither the value nor the gradient.

    Raises:
        TrainError: the loss has the wrong shape or does not depend on the log-probs.
    """
    inputs = _loss_inputs(micro, packed, scores, streams)
    output = loss(inputs)
    shapes = {"per_token": output.per_token, **output.metrics}
    for name, values in shapes.items():
        if values.shape != inputs.logprobs.shape:
            raise TrainError(
                f"the loss returned {name} of shape {tuple(values.shape)} for {micro.num_tokens} tokens",
                hint="a loss returns one value a token; the trainer scales and sums",
            )
    if not output.per_token.requires_grad:
        raise TrainError(
            "the loss does not depend on the log-probs, so there is nothing to train",
            hint="compute the loss from inputs.logprobs, without detaching them",
        )
    per_token = output.per_token.index_select(0, packed.index)
    scales = torch.from_numpy(micro.scales).to(per_token.device).index_select(0, packed.index)
    return MicroResult(
        loss=(per_token.double() * scales).sum(),
        logprobs=scores.logprob.detach(),
        entropy=scores.entropy,
        per_token=per_token.detach(),
        metrics={name: m.detach().index_select(0, packed.index) for name, m in output.metrics.items()},
    )


def send_back(loss: Tensor, scores: TokenScores, *, always: bool) -> bool:
    """The backward pass of a micro-batch, left out when the loss is flat: when no log-prob has a gradient.

    Groups whose members all have the same reward are like that, and a backward pass is two thirds of the work.

    Args:
        loss: of the micro-batch, a scalar that depends on the weights through `scores` alone.
        always: do not leave it out: some gradient must exist, or other ranks take part in this pass.

    Returns:
        Whether gradients were added to.
    """
    if always:
        loss.backward()
        return True
    (slope,) = torch.autograd.grad(loss, scores.logprob)
    sent = bool(slope.any())
    if sent:
        scores.logprob.backward(slope)
    return sent


def _loss_inputs(micro: MicroBatch, packed: Indexed, scores: TokenScores, streams: frozenset[str]) -> LossInputs:
    device, dtype = scores.logprob.device, scores.logprob.dtype
    tensors = {name: torch.from_numpy(micro.stream(name)).to(device) for name in sorted(streams)}
    tensors = {name: t.to(dtype) if t.is_floating_point() else t.long() for name, t in tensors.items()}
    numbers: dict[str, int] = {}
    episodes = [numbers.setdefault(sample.episode_id, len(numbers)) for sample in micro.samples]
    return LossInputs(
        logprobs=torch.zeros(micro.num_tokens, device=device, dtype=dtype).index_copy(0, packed.index, scores.logprob),
        entropy=torch.zeros(micro.num_tokens, device=device, dtype=dtype).index_copy(0, packed.index, scores.entropy),
        streams=tensors,
        weight=tensors["weight"],
        sequence=torch.from_numpy(np.repeat(np.arange(len(micro.samples)), micro.lengths)).to(device),
        episode=torch.from_numpy(np.repeat(np.asarray(episodes), micro.lengths)).to(device),
        num_sequences=len(micro.samples),
    )


class StepTotals:
    """Adds up the micro-batches of a step. Sums are float64, so that no split shows in a reported figure."""

    def __init__(self, batch: TrainBatch) -> None:
        self._batch = batch
        self._parts: list[tuple[MicroBatch, MicroResult]] = []
        names = [set(sample.streams) for sample in batch.samples]
        self.streams: frozenset[str] = frozenset(set.intersection(*names)) if names else frozenset()

    def add(self, micro: MicroBatch, result: MicroResult) -> None:
        self._parts.append((micro, replace(result, loss=result.loss.detach())))

    def stats(self, *, grad_norm: float, lr: float) -> StepStats:
        """Means over the trained tokens of the whole step."""
        results = [result for _, result in self._parts]
        names = {name: None for result in results for name in result.metrics}
        logprobs = _numpy([result.logprobs for result in results])
        trained = [micro.stream("weight") > 0 for micro, _ in self._parts]
        versions = np.concatenate([m.stream("version")[t] for (m, _), t in zip(self._parts, trained, strict=True)])
        compared = versions >= 0
        mismatch = None
        if "behaviour" in self.streams and compared.any():
            engine = np.concatenate([m.stream("behaviour")[t] for (m, _), t in zip(self._parts, trained, strict=True)])
            mismatch = measure_mismatch(logprobs[compared], engine[compared])
        return StepStats(
            loss=float(sum(float(result.loss) for result in results)),
            grad_norm=grad_norm,
            lr=lr,
            metrics={name: float(_numpy([r.metrics[name] for r in results]).mean()) for name in names},
            entropy=float(_numpy([result.entropy for result in results]).mean()),
            mismatch=mismatch,
            num_tokens=self._batch.num_tokens,
            num_trained_tokens=len(logprobs),
            num_micro_batches=len(self._batch.micro_batches),
            skipped=False,
        )

    def skipped(self, *, lr: float) -> StepStats:
        """Stats of a step that trains nothing."""
        micro_batches = len(self._batch.micro_batches)
        return StepStats(0.0, 0.0, lr, {}, 0.0, None, self._batch.num_tokens, 0, micro_batches, skipped=True)

    def not_finite(self) -> TrainError:
        """The error of a step whose gradient is not finite; names the samples where it began."""
        culprits: dict[str, None] = {}
        for micro, result in self._parts:
            wrong = ~(torch.isfinite(result.per_token) & torch.isfinite(result.logprobs)).cpu().numpy()
            tokens = np.flatnonzero(micro.stream("weight") > 0)[wrong]
            for number in np.unique(np.searchsorted(micro.cu_seqlens, tokens, side="right") - 1):
                sample = micro.samples[int(number)]
                culprits[f"segment {sample.segment} of episode {sample.episode_id}"] = None
        if culprits:
            return TrainError(
                f"the loss is not finite in {_some(list(culprits))}; nothing was updated",
                hint="look at these episodes with `sluice episodes`: an infinite advantage comes from the reward, "
                "infinite behaviour log-probs from the engine, and if both are finite the model has diverged",
            )
        everyone = [f"segment {s.segment} of episode {s.episode_id}" for s in self._batch.samples]
        return TrainError(
            f"the loss is finite but its gradient is not; nothing was updated. Trained: {_some(everyone)}",
            hint="the model has diverged: resume from the last checkpoint with a lower train.optimizer.lr, "
            "or train.dtype = 'float32'",
        )


def _numpy(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).double().cpu().numpy()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED_SAMPLES])
    return shown + (f" and {len(names) - _NAMED_SAMPLES} more" if len(names) > _NAMED_SAMPLES else "")
