"""Drawing tokens: temperature, cuts, and noise that depends on nothing but (noise key, position).

Each draw takes one uniform number, made by hashing the request's noise key with the index of the new token
in its whole sequence, and inverts the cumulative distribution. So a token is the same whoever shares the
batch, and a continuation after an interruption draws what the uninterrupted request would have drawn.

The three cuts are each defined on softmax(logits / T) and the kept set is their intersection: the `top_k`
likeliest tokens, the smallest set of likeliest tokens whose mass reaches `top_p`, the tokens with at least
`min_p` times the likeliest one's probability. Ties go to the lower id.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sluice.errors import EngineError
from sluice.types import SamplingParams

DRAW_ELEMENTS = 1 << 23
"""Rows × vocabulary handled at once: the float64 distribution of a larger batch is made piece by piece."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection of 64-bit words in which every input bit reaches every
    output bit."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits per (key, position); all arrays have shape `[rows]`."""
    counters = (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    bits = _mix(_mix(keys + _GOLDEN) + counters)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Draw(NamedTuple):
    """Tokens, log-softmax(logits / T) of each, and its log-prob in the distribution drawn from: `[rows]`.

    A greedy draw has log-prob 0 in the latter, since nothing else could have come. For a plain draw the two
    log-probs are equal.
    """

    tokens: list[int]
    logprobs: list[float]
    sampled_logprobs: list[float]


def draw(
    logits: Tensor,
    sampling: list[SamplingParams],
    keys: NDArray[np.uint64],
    positions: NDArray[np.int64],
) -> Draw:
    """Draw one token per row.

    Args:
        logits: `[rows, vocabulary]`, any float dtype.
        sampling: of each row.
        keys, positions: noise key, and index of the new token in its sequence, of each row.

    Raises:
        EngineError: a row has a logit that is NaN, or no finite one.
    """
    rows, vocabulary = logits.shape
    size = max(DRAW_ELEMENTS // vocabulary, 1)
    noise = uniforms(keys, positions)
    parts = [
        _draw_rows(logits[at : at + size].float(), sampling[at : at + size], noise[at : at + size])
        for at in range(0, rows, size)
    ]
    if len(parts) == 1:
        return parts[0]
    return Draw(*(list(chain.from_iterable(lists)) for lists in zip(*parts, strict=True)))


def _draw_rows(logits: Tensor, sampling: list[SamplingParams], noise: NDArray[np.float64]) -> Draw:
    temperatures = {params.temperature for params in sampling}
    if temperatures != {1.0}:
        divisors = [params.temperature or 1.0 for params in sampling]
        logits = logits / torch.tensor(divisors, dtype=torch.float32, device=logits.device)[:, None]
    logprobs = torch.log_softmax(logits, dim=-1)
    uniform = torch.from_numpy(noise).to(logits.device)
    tokens = _invert(logprobs.exp().double().cumsum(dim=-1), uniform)
    sampled = logprobs.gather(1, tokens[:, None])[:, 0]
    cut = [at for at, params in enumerate(sampling) if params.temperature > 0 and not params.is_plain]
    if cut:
        index = torch.tensor(cut, device=logits.device)
        kept_tokens, kept_logprobs = _draw_cut(logprobs[index], [sampling[at] for at in cut], uniform[index])
        tokens[index], sampled[index] = kept_tokens, kept_logprobs
    if 0.0 in temperatures:
        greedy = torch.tensor([params.temperature == 0 for params in sampling], device=logits.device)
        tokens = torch.where(greedy, logits.argmax(dim=-1), tokens)
        sampled = torch.where(greedy, 0.0, sampled)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    if not bool(torch.isfinite(chosen).all()):
        bad = int((~torch.isfinite(chosen)).sum())
        raise EngineError(
            f"the model gave logits that are not finite to {bad} of {len(sampling)} sequences",
            hint="the weights that are being served are broken: look at the loss before they were published",
        )
    return Draw(tokens.tolist(), chosen.tolist(), sampled.tolist())


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds `uniform` × total; `[rows, n]`, `[rows]` → `[rows]`.

    The product is kept below the total, so that rounding cannot pass the last index that has any mass.
    """
    total = cumulative[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform * total, below)
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return found.clamp_(max=cumulative.shape[1] - 1)


def kept(probabilities: Tensor, sampling: list[SamplingParams]) -> Tensor:
    """Which of the descending `probabilities` `[rows, n]` (float64) the cuts keep; bool of the same shape."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=probabilities.device)[:, None]

    n = probabilities.shape[1]
    ranks = torch.arange(n, device=probabilities.device)
    top_k = column([float(params.top_k if params.top_k > 0 else n) for params in sampling])
    # At top_p = 1 the cumulative sum may reach 1 by rounding before the tail: infinity keeps all of it.
    top_p = column([params.top_p if params.top_p < 1 else float("inf") for params in sampling])
    min_p = column([params.min_p for params in sampling])
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    keep = (ranks < top_k) & (mass_before < top_p) & (probabilities >= min_p * probabilities[:, :1])
    keep[:, 0] = True
    return keep


def _draw_cut(logprobs: Tensor, sampling: list[SamplingParams], uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from the renormalised kept set: tokens and their log-probs in it, `[rows]` each."""
    ordered, order = torch.sort(logprobs, dim=-1, descending=True, stable=True)
    probabilities = ordered.double().exp()
    probabilities = probabilities * kept(probabilities, sampling)
    cumulative = probabilities.cumsum(dim=-1)
    place = _invert(cumulative, uniform)[:, None]
    logprob = (probabilities.gather(1, place) / cumulative[:, -1:]).log()
    return order.gather(1, place)[:, 0], logprob[:, 0].float()
