"""Log-probabilities and entropy of tokens without tokens × vocabulary: a chunk of logits at a time.

Formulas, with z = (W h + b) / T: log p(y) = z_y - logsumexp(z); H = logsumexp(z) - Σ softmax(z) z;
∂ log p(y) / ∂(W h + b) = (onehot(y) - softmax(z)) / T. The backward pass computes the logits of a chunk
again, so that peak memory is two float32 buffers of chunk × vocabulary, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class TokenScores(NamedTuple):
    """Shape `[tokens]` each: `logprob` in nats with gradient, `entropy` in nats without."""

    logprob: Tensor
    entropy: Tensor


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    *,
    chunk: int,
) -> TokenScores:
    """log softmax(logits / T) at the targets, and the entropy of that distribution.

    Softmax and sums are in float32 also when hidden states and weights are bfloat16 (in float64 when they
    are float64). Entropy is a metric: it carries no gradient.

    Args:
        hidden: `[tokens, hidden size]`, the states that predict the targets.
        weight: of the head, `[vocabulary, hidden size]`.
        bias: of the head, `[vocabulary]`, or None.
        targets: token ids, int64 `[tokens]`.
        temperature: T > 0 of each token, `[tokens]`.
        chunk: tokens whose logits exist at one time.
    """
    logprob, entropy = _TokenScores.apply(hidden, weight, bias, targets, temperature, chunk)
    return TokenScores(logprob, entropy)


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor) -> Tensor:
    """`[chunk, vocabulary]` of logits / T less the largest of each row, in the accumulation dtype.

    The largest is subtracted so that no exponential overflows; the caller may overwrite the buffer.
    """
    logits = linear(hidden, weight, bias).to(_wide(hidden.dtype))
    logits.div_(temperature.to(logits.dtype).unsqueeze(1))
    return logits.sub_(logits.amax(dim=1, keepdim=True))


def _chunk_scores(logits: Tensor, targets: Tensor) -> TokenScores:
    """Scores of one chunk from its scaled logits, which are overwritten."""
    chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    weights = logits.exp()
    total = weights.sum(dim=1)
    normaliser = total.log()
    return TokenScores(chosen - normaliser, normaliser - logits.mul_(weights).sum(dim=1) / total)


def _chunk_slope(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """(onehot - softmax) · scale in the buffer of the scaled logits; `scale` is `[chunk]`."""
    weights = logits.exp_()
    weights.mul_((-scale / weights.sum(dim=1)).unsqueeze(1))
    return weights.scatter_add_(1, targets.unsqueeze(1), scale.unsqueeze(1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """total += slopeᵀ · hidden, the sum in the dtype of `total`."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, hidden)
    else:
        total += slope.T @ hidden


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logprob = torch.empty(len(targets), dtype=_wide(hidden.dtype), device=hidden.device)
        entropy = torch.empty_like(logprob)
        for start in range(0, len(targets), chunk):
            here = slice(start, start + chunk)
            # Nothing of a chunk has a name here, so that its buffers are free before the next one's are made.
            logprob[here], entropy[here] = _chunk_scores(
                _scaled_logits(hidden[here], weight, bias, temperature[here]), targets[here]
            )
        ctx.save_for_backward(hidden, weight, bias, targets, temperature)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperature = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = _wide(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if wants_bias else None
        for start in range(0, len(targets), ctx.chunk):
            here = slice(start, start + ctx.chunk)
            scale = (grads[0][here] / temperature[here]).to(wide)
            slope = _chunk_slope(_scaled_logits(hidden[here], weight, bias, temperature[here]), targets[here], scale)
            if grad_bias is not None:
                grad_bias += slope.sum(dim=0)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[here] = slope @ weight
            if grad_weight is not None:
                _add_product(grad_weight, slope, hidden[here])
            del slope
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            None,
            None,
            None,
        )
