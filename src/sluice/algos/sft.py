"""Supervised fine-tuning: cross-entropy on demonstrated tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sluice.algos.base import Advantages, Unit
from sluice.types import STREAMS, Ids, LossInputs, LossOutput, Normaliser, TrainSample


class SFT:
    """-log π per demonstrated token, averaged over the tokens of the step. Implements `Objective`."""

    requires: frozenset[str] = frozenset()
    normaliser = Normaliser.TOKEN
    constant = 1.0

    def credit(self, units: Sequence[Unit]) -> Advantages:
        """No credit: every demonstrated token weighs the same."""
        return {sample.key: np.zeros(len(sample)) for unit in units for sample in unit}

    def loss(self, inputs: LossInputs) -> LossOutput:
        return LossOutput(-inputs.logprobs, {})

    def report(self, units: Sequence[Unit]) -> Mapping[str, float]:
        """Nothing beyond the trainer's loss."""
        return {}


def demonstration(name: str, prompt: Ids, response: Ids) -> TrainSample:
    """A demonstrated response as a sample: weight 1 at its tokens, shape `[len(prompt) + len(response)]`."""
    ids = np.concatenate([prompt, response]).astype(np.int32)
    names = ("behaviour", "weight", "version", "temperature", "turn", "advantage")
    streams = {stream: np.full(len(ids), STREAMS[stream][1], dtype=STREAMS[stream][0]) for stream in names}
    streams["weight"][len(prompt) :] = 1.0
    streams["turn"][: len(prompt)] = 0
    streams["turn"][len(prompt) :] = 1
    return TrainSample(name, name, 0, ids, streams)
