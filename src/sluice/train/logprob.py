"""Log-probabilities and entropy of tokens without tokens × vocabulary: a chunk of logits at a time.

Formulas, with z = (W h + b) / T: log p(y) = z_y - logsumexp(z); H = logsumexp(z) - Σ softmax(z) z;
∂ log p(y) / ∂(W h + b) = (onehot(y) - softmax(z)) / T. The backward pass computes the logits of a chunk
again, so that peak memory is two float32 buffers of chunk × vocabulary, whatever the number of tokens.

The vocabulary may be divided over ranks. Each then holds the logits of its part, and per token three sums and a
maximum are added up over them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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
    over: dist.ProcessGroup | None = None,
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
        over: the ranks that the vocabulary is divided over, in equal parts by rank, all with the same tokens. `weight`
            and `bias` are this rank's part. The gradient of `hidden` is this rank's share of a sum over ranks.
    """
    logprob, entropy = _TokenScores.apply(hidden, weight, bias, targets, temperature, chunk, over)
    return TokenScores(logprob, entropy)


class _Chunk:
    """The logits / T of one chunk less the largest of each row, `[chunk, vocabulary]`, and where its targets stand."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor,
        over: dist.ProcessGroup | None,
        peak: Tensor | None = None,
    ) -> None:
        self._over = over
        logits = linear(hidden, weight, bias).to(_wide(hidden.dtype))
        logits.div_(temperature.to(logits.dtype).unsqueeze(1))
        if peak is None:
            peak = logits.amax(dim=1)
            if over is not None:
                dist.all_reduce(peak, dist.ReduceOp.MAX, over)
        self.peak = peak
        self._logits = logits.sub_(peak.unsqueeze(1))  # so that no exponential overflows
        first = dist.get_rank(over) * len(weight) if over is not None else 0
        self._inside = (targets >= first) & (targets < first + len(weight)) if over is not None else None
        self._at = (targets - first).clamp(0, len(weight) - 1).unsqueeze(1)

    def scores(self) -> tuple[TokenScores, Tensor]:
        """Scores, and the sum of exponentials of each row. The logits are overwritten."""
        chosen = self._logits.gather(1, self._at).squeeze(1)
        if self._inside is not None:
            chosen = chosen * self._inside
        weights = self._logits.exp()
        sums = torch.stack([chosen, weights.sum(dim=1), self._logits.mul_(weights).sum(dim=1)])
        if self._over is not None:
            dist.all_reduce(sums, group=self._over)
        chosen, total, moment = sums
        normaliser = total.log()
        return TokenScores(chosen - normaliser, normaliser - moment / total), total

    def slope(self, total: Tensor, scale: Tensor) -> Tensor:
        """(onehot - softmax) · scale in the buffer of the logits; `scale` and `total` are `[chunk]`."""
        weights = self._logits.exp_()
        weights.mul_((-scale / total).unsqueeze(1))
        hit = scale if self._inside is None else scale * self._inside
        return weights.scatter_add_(1, self._at, hit.unsqueeze(1))


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
        over: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        logprob = torch.empty(len(targets), dtype=_wide(hidden.dtype), device=hidden.device)
        entropy, peak, total = (torch.empty_like(logprob) for _ in range(3))
        for start in range(0, len(targets), chunk):
            here = slice(start, start + chunk)
            part = _Chunk(hidden[here], weight, bias, targets[here], temperature[here], over)
            peak[here] = part.peak
            (logprob[here], entropy[here]), total[here] = part.scores()
            del part  # its buffers are free before the next one's are made
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, peak, total)
        ctx.chunk, ctx.over = chunk, over
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperature, peak, total = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = _wide(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if wants_bias else None
        for start in range(0, len(targets), ctx.chunk):
            here = slice(start, start + ctx.chunk)
            scale = (grads[0][here] / temperature[here]).to(wide)
            part = _Chunk(hidden[here], weight, bias, targets[here], temperature[here], ctx.over, peak[here])
            slope = part.slope(total[here], scale)
            del part
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
            *(None,) * 4,
        )
