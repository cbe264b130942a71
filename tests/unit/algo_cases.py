"""A packed micro-batch of three segments, and tools to hold a loss against an independent computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sluice.types import LossInputs, LossOutput

SEGMENTS = ((0, 0, 1, 1, 0, 0, 1, 1, 1), (0, 1, 1), (0, 0, 1, 0, 1, 1, 1))
"""Weights of three segments: prompts, a tool's output or stale tokens (0) between two turns, sampled tokens (1)."""


@dataclass(frozen=True)
class Case:
    """Per-token lists of the packed segments, in plain floats."""

    logprob: list[float]
    behaviour: list[float]
    proximal: list[float]
    reference: list[float]
    advantage: list[float]
    lag: list[int]
    weight: list[int]
    sequence: list[int]

    def __len__(self) -> int:
        return len(self.weight)

    def trained(self, sequence: int) -> list[int]:
        """Positions of the trained tokens of a segment."""
        return [t for t in range(len(self)) if self.sequence[t] == sequence and self.weight[t]]

    def inputs(self, dtype: torch.dtype = torch.float64) -> LossInputs:
        def tensor(values: list[float] | list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype)

        names = ("behaviour", "proximal", "reference", "advantage")
        streams = {name: tensor(getattr(self, name)) for name in names}
        return LossInputs(
            logprobs=tensor(self.logprob).requires_grad_(),
            entropy=torch.zeros(len(self), dtype=dtype),
            streams={**streams, "lag": torch.tensor(self.lag)},
            weight=tensor(self.weight),
            sequence=torch.tensor(self.sequence),
            episode=torch.tensor(self.sequence),
            num_sequences=len(SEGMENTS),
        )


def case(seed: int, spread: float = 0.6) -> Case:
    """Random log-probs around -2; `spread` is how far the policies are apart. As in the trainer, log-probs and scored
    streams are 0 where nothing is trained, but behaviour is what it was."""
    draw = torch.Generator().manual_seed(seed)
    weight = [w for segment in SEGMENTS for w in segment]
    sequence = [number for number, segment in enumerate(SEGMENTS) for _ in segment]

    def noise(scale: float) -> list[float]:
        return (torch.randn(len(weight), generator=draw, dtype=torch.float64) * scale).tolist()

    behaviour = [-2.0 + x for x in noise(0.5)]

    def near(scale: float) -> list[float]:
        return [(b + x) * w for b, x, w in zip(behaviour, noise(scale), weight, strict=True)]

    per_segment = noise(1.0)
    lags = [-1 if not w else (t * 7) % 4 for t, w in enumerate(weight)]
    return Case(
        near(spread), behaviour, near(spread), near(spread), [per_segment[s] for s in sequence], lags, weight, sequence
    )


def loss_and_gradient(output: LossOutput, inputs: LossInputs, scales: list[float]) -> tuple[list[float], list[float]]:
    """Per-token loss, and the gradient of Σ scale · loss by log-prob, at trained tokens; 0 elsewhere."""
    trained = inputs.weight > 0
    scale = torch.tensor(scales, dtype=torch.float64)
    (output.per_token.double() * scale)[trained].sum().backward()
    assert inputs.logprobs.grad is not None
    losses = torch.where(trained, output.per_token.detach().double(), 0.0)
    return losses.tolist(), torch.where(trained, inputs.logprobs.grad.double(), 0.0).tolist()


def slope(total: Callable[[list[float]], float], at: list[float], step: float = 1e-6) -> list[float]:
    """Gradient of `total` by central differences."""
    found: list[float] = []
    for index in range(len(at)):
        ahead, behind = list(at), list(at)
        ahead[index] += step
        behind[index] -= step
        found.append((total(ahead) - total(behind)) / (2 * step))
    return found


def clip(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def clipped_term(ratio: float, advantage: float, low: float, high: float) -> float:
    """PPO's objective of one token."""
    return min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
