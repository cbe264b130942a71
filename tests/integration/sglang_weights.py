"""A trainer's side for the tests of SGLang servers: versions of the tiny model, and what it says about tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from sluice.rollout.engines.base import Generation
from sluice.types import Version, VersionSpan
from sluice.weights.lineage import Lineage
from sluice.weights.store import MemoryWeights, WeightStore

TOLERANCE = 1e-5
"""Of log-probs of about -4 in float32, summed in two different orders; 2.6e-6 (T = 1) and 6.4e-6 (T = 0.7) were
measured over 3200 tokens."""
PROMPT = [3, 12, 4, 16, 5]


class Weights:
    """A trainer's side: versions of the tiny model, each a little further from the first."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.store = WeightStore(home, folder, Lineage())
        self.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.step = -1

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()

    def publish(self) -> MemoryWeights:
        self.step += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.02)
        return self.store.publish(self, self.step)

    def logits(self, ids: list[int]) -> Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0]


def logprobs(weights: Weights, prompt: list[int], ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """What the trainer's model says about the tokens that the engine drew."""
    rows = (weights.logits(prompt + ids)[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return rows[torch.arange(len(ids)), torch.tensor(ids)].numpy()


def check(weights: Weights, got: Generation, version: Version, temperature: float = 1.0) -> None:
    expected = logprobs(weights, PROMPT, got.ids.tolist(), temperature)
    np.testing.assert_allclose(got.logprobs, expected, rtol=0, atol=TOLERANCE)
    assert got.spans == (VersionSpan(0, len(got.ids), version),)
