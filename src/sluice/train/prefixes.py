"""Samples of a micro-batch that begin with the same tokens: which of them a causal model need not compute again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sluice.types import Ids

_WORTH = 1 / 16
"""Repeated tokens, as a share of all, below which leaving them out would cost more than they do."""


def first_copies(samples: Sequence[Ids]) -> NDArray[np.int64] | None:
    """For each token of samples that stand end to end, the token that has the same state in a causal model.

    Two tokens have the same state when all ids up to and with them are the same. In lexicographic order a sample
    shares with all before it what it shares with its neighbour, so that forks at any depth are found.

    Args:
        samples: ids of each sample, from its first token on.

    Returns:
        int64 `[tokens]`; a token that stands for itself has its own place. None where too few are repeated.
    """
    lengths = np.array([len(ids) for ids in samples], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    keys = [np.asarray(ids).astype(">i4").tobytes() for ids in samples]
    order = sorted(range(len(samples)), key=keys.__getitem__)
    copies = np.arange(starts[-1], dtype=np.int64)
    repeated = 0
    for before, here in pairwise(order):
        shared = _common(samples[before], samples[here])
        copies[starts[here] : starts[here] + shared] = copies[starts[before] : starts[before] + shared]
        repeated += shared
    return copies if repeated > 0 and repeated >= _WORTH * len(copies) else None


def _common(one: Ids, other: Ids) -> int:
    """Tokens that both begin with."""
    shorter = min(len(one), len(other))
    differ = one[:shorter] != other[:shorter]
    return int(differ.argmax()) if differ.any() else shorter
