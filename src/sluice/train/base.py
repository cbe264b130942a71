"""What the loop asks of a trainer. Nothing here knows an algorithm: the loss is handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sluice.types import LossInputs, LossOutput, TrainBatch, TrainSample, ValueInputs

Loss: TypeAlias = Callable[[LossInputs], LossOutput]
"""Per-token loss of one micro-batch; see `LossOutput`."""

ValueLoss: TypeAlias = Callable[[ValueInputs], LossOutput]
"""The same of a critic."""


Writer: TypeAlias = Callable[[Path], None]
"""Writes files into a folder that is there. For any thread."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A trainer at one moment: what is written later on is that moment, whatever has been trained since.

    Attributes:
        model: writes the weights as a Hugging Face folder that engines and `load_model` read.
        state: writes what `model` leaves out: moments, step count, random state, full-precision weights.
    """

    model: Writer
    state: Writer


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far trainer and engine log-probs of the same tokens are apart, in nats.

    Attributes:
        mean_abs, p999, max_abs: of |trainer - engine|: mean, 99.9th percentile, maximum.
        kl: KL(engine ‖ trainer) by the k3 estimator, mean of r - 1 - log r with r = p_trainer / p_engine
            (Schulman, "Approximating KL divergence", 2020).
        num_tokens: tokens that were compared.
    """

    mean_abs: float
    p999: float
    max_abs: float
    kl: float
    num_tokens: int


def measure_mismatch(trainer: NDArray[np.floating], engine: NDArray[np.floating]) -> Mismatch | None:
    """Compare log-probs of the same tokens, shape `[n]` each; None when there are none."""
    if len(trainer) == 0:
        return None
    log_ratio = trainer.astype(np.float64) - engine.astype(np.float64)
    size = np.abs(log_ratio)
    return Mismatch(
        mean_abs=float(size.mean()),
        p999=float(np.quantile(size, 0.999)),
        max_abs=float(size.max()),
        kl=float(np.mean(np.expm1(log_ratio) - log_ratio)),
        num_tokens=len(size),
    )


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one optimizer step did. No figure depends on how the batch was split.

    Attributes:
        loss: Σ scale · token loss over the step.
        grad_norm: global L2 norm before clipping.
        lr: rate that was used.
        metrics: what the loss reported, mean over trained tokens.
        entropy: mean over trained tokens, in nats.
        mismatch: trained tokens with a version against their `behaviour` stream, under the weights the step
            began with; None when there are none (supervised samples).
        num_tokens: tokens that went through the model.
        num_trained_tokens: tokens in the loss.
        num_micro_batches: forward and backward passes.
        skipped: True when nothing was trained: weights, moments and schedule are untouched.
    """

    loss: float
    grad_norm: float
    lr: float
    metrics: Mapping[str, float]
    entropy: float
    mismatch: Mismatch | None
    num_tokens: int
    num_trained_tokens: int
    num_micro_batches: int
    skipped: bool


class Trainer(Protocol):
    """One model in training. Also a `weights.Source`."""

    def score(self, samples: Sequence[TrainSample], streams: frozenset[str]) -> list[TrainSample]:
        """Fill log-prob streams, no gradient: `proximal` by the current weights, `reference` by the first,
        `teacher:NAME` by that teacher's.

        Log-probs are at each token's recorded temperature. Filled are the tokens the policy sampled
        (version >= 0) and those that are trained (weight > 0); all others stay 0. Order is kept.

        Raises:
            TrainError: a stream this trainer cannot fill, or a sample longer than a micro-batch.
        """
        ...

    def step(self, batch: TrainBatch, loss: Loss) -> StepStats:
        """One optimizer step: every micro-batch forward and backward, clip, update, advance the schedule.

        A batch without a trained token changes nothing and comes back as `skipped`.

        Raises:
            TrainError: loss or gradient are not finite; nothing was updated. The message names the samples.
        """
        ...

    def offload(self) -> None:
        """Leave the accelerator: weights, moments, frozen policies go to host memory. Nothing else is lost.

        What does not compute still works meanwhile: `named_weights`, `snapshot`, `save_model`, `save_state`,
        `load_state`.
        Harmless when repeated, and on a CPU, where there is nowhere to go.
        """
        ...

    def onload(self) -> None:
        """Inverse of `offload`. The next `score` or `step` is the same bit for bit as without either."""
        ...

    def peak_memory(self) -> list[int]:
        """Bytes at most so far, of each process that trains: on its accelerator, or resident on a CPU."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, under its Hugging Face checkpoint name, tied ones under the first name only."""
        ...

    def snapshot(self, *, copy: bool = True) -> Snapshot:
        """Weights and state as they are now, in host memory until they are written.

        Args:
            copy: they are the snapshot's own, and training may go on. Without, they may be the trainer's: nothing but
                the snapshot's writers may be called until both have been.
        """
        ...

    def save_model(self, folder: Path) -> None:
        """Write the model of a snapshot that is taken now."""
        ...

    def save_state(self, folder: Path) -> None:
        """Write the state of a snapshot that is taken now."""
        ...

    def load_state(self, model: Path, state: Path) -> None:
        """Restore what `save_model` and `save_state` wrote. Training goes on bit for bit.

        Raises:
            CheckpointError: files are missing, or of another architecture (named by the first field or
                tensor that differs).
        """
        ...


@dataclass(frozen=True, slots=True)
class CriticStats:
    """What one update of a critic did; see `StepStats`. All zero when nothing was trained."""

    loss: float
    grad_norm: float
    lr: float
    metrics: Mapping[str, float]


class Critic(Protocol):
    """One value model in training. It knows no algorithm either: its loss is handed in."""

    def score(self, samples: Sequence[TrainSample]) -> list[TrainSample]:
        """Fill the `value` stream at the tokens that `Trainer.score` fills: the value before each, no gradient.

        Raises:
            TrainError: a sample is longer than a micro-batch.
        """
        ...

    def step(self, batch: TrainBatch, loss: ValueLoss) -> CriticStats:
        """One optimizer step over every micro-batch; a batch without a trained token changes nothing.

        Raises:
            TrainError: loss or gradient are not finite; nothing was updated.
        """
        ...

    def offload(self) -> None:
        """See `Trainer.offload`."""
        ...

    def onload(self) -> None:
        """See `Trainer.onload`."""
        ...

    def snapshot(self, *, copy: bool = True) -> Writer:
        """Everything as it is now: weights, moments, step count; see `Trainer.snapshot`."""
        ...

    def save_state(self, folder: Path) -> None:
        """Write a snapshot that is taken now."""
        ...

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote. Training goes on bit for bit.

        Raises:
            CheckpointError: files are missing or damaged, or of another architecture.
        """
        ...
