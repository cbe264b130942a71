"""Log-probabilities and entropy of tokens without tokens × vocabulary: a chunk of logits at a time.

Formulas, with z = (W h + b) / T: log p(y) = z_y - logsumexp(z); H = logsumexp(z) - Σ softmax(z) z;
∂ log p(y) / ∂(W h + b) = (onehot(y) - softmax(z)) / T. The backward pass computes the logits of a chunk
again, so that peak memory is two float32 buffers of chunk × vocabulary and the logits where they are narrower,
whatever the number of tokens. Compiled it is two buffers of the logits' own dtype, and each is passed over once.

The vocabulary may be divided over ranks. Each then holds the logits of its part, and per token three sums and a
maximum are added up over them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from sluice.train.compiled import over_tokens


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
    compiled: bool | None = None,
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
        compiled: what is done to logits takes one pass over them, by `torch.compile`; None does so on an accelerator.

    Raises:
        TrainError: see `over_tokens`.
    """
    kernels = _kernels(hidden.device.type != "cpu" if compiled is None else compiled)
    logprob, entropy = _TokenScores.apply(hidden, weight, bias, targets, temperature, chunk, over, kernels)
    return TokenScores(logprob, entropy)


class _Chunk:
    """Logits of one chunk, `[chunk, vocabulary]`, which one of the two methods is called for, once.

    Args:
        hidden: `[chunk, hidden size]`.
        peak: largest logit / T of each row, `[chunk, 1]`; None finds it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor,
        over: dist.ProcessGroup | None,
        kernels: _Kernels,
        peak: Tensor | None = None,
    ) -> None:
        self._over = over
        self._kernels = kernels
        self._logits = linear(hidden, weight, bias)
        self._temperature = temperature.to(_wide(hidden.dtype)).unsqueeze(1)
        if peak is None:
            peak = self._logits.amax(dim=1, keepdim=True) / self._temperature  # as division keeps order
            if over is not None:
                dist.all_reduce(peak, dist.ReduceOp.MAX, over)
        self.peak = peak
        first = dist.get_rank(over) * len(weight) if over is not None else 0
        inside = (targets >= first) & (targets < first + len(weight)) if over is not None else None
        self._inside = None if inside is None else inside.unsqueeze(1)
        self._at = (targets - first).clamp(0, len(weight) - 1).unsqueeze(1)

    def scores(self) -> tuple[TokenScores, Tensor]:
        """Scores, and the sum of exponentials of each row, `[chunk, 1]`."""
        sums = self._kernels.sums(self._logits, self._temperature, self.peak, self._at)
        if self._inside is not None:
            sums[:, :1] *= self._inside
        if self._over is not None:
            dist.all_reduce(sums, group=self._over)
        chosen, total, moment = sums.unbind(1)
        normaliser = total.log()
        return TokenScores(chosen - normaliser, normaliser - moment / total), total.unsqueeze(1)

    def slope(self, total: Tensor, scale: Tensor) -> Tensor:
        """(onehot - softmax) · scale, in the dtype of the logits; `scale` and `total` are `[chunk, 1]`."""
        hit = scale if self._inside is None else scale * self._inside
        return self._kernels.slope(self._logits, self._temperature, self.peak, self._at, hit, scale / total)


def _sums(logits: Tensor, temperature: Tensor, peak: Tensor, at: Tensor) -> Tensor:
    """With z = logits / T - peak: z at the target, Σ exp z and Σ z exp z of each row, `[chunk, 3]`.

    Args:
        logits: `[chunk, vocabulary]`; overwritten where they are as wide as `peak`.
        temperature, peak, at: `[chunk, 1]`.
    """
    chosen = logits.gather(1, at) / temperature - peak
    shifted = _shifted(logits, temperature, peak)
    weights = shifted.exp()
    return torch.cat([chosen, weights.sum(1, keepdim=True), shifted.mul_(weights).sum(1, keepdim=True)], dim=1)


def _slope(logits: Tensor, temperature: Tensor, peak: Tensor, at: Tensor, hit: Tensor, scale: Tensor) -> Tensor:
    """onehot(at) · hit - exp(z) · scale, in the dtype of the logits, which are overwritten as in `_sums`."""
    weights = _shifted(logits, temperature, peak).exp_().mul_(-scale)
    if torch.compiler.is_compiling():  # one pass over all, where adding at the targets would be a second
        columns = torch.arange(logits.shape[1], device=logits.device)
        return torch.where(columns == at, weights + hit, weights).to(logits.dtype)
    return weights.scatter_add_(1, at, hit).to(logits.dtype)


def _shifted(logits: Tensor, temperature: Tensor, peak: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return logits / temperature - peak
    return logits.to(peak.dtype).div_(temperature).sub_(peak)


class _Kernels(NamedTuple):
    sums: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@cache
def _kernels(compiled: bool) -> _Kernels:
    return _Kernels(over_tokens(_sums), over_tokens(_slope)) if compiled else _Kernels(_sums, _slope)


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
        kernels: _Kernels,
    ) -> tuple[Tensor, Tensor]:
        logprob = torch.empty(len(targets), dtype=_wide(hidden.dtype), device=hidden.device)
        entropy = torch.empty_like(logprob)
        peak, total = (torch.empty_like(logprob).unsqueeze(1) for _ in range(2))
        for start in range(0, len(targets), chunk):
            here = slice(start, start + chunk)
            part = _Chunk(hidden[here], weight, bias, targets[here], temperature[here], over, kernels)
            peak[here] = part.peak
            (logprob[here], entropy[here]), total[here] = part.scores()
            del part  # its buffers are free before the next one's are made
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, peak, total)
        ctx.chunk, ctx.over, ctx.kernels = chunk, over, kernels
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
            scale = (grads[0][here] / temperature[here]).to(wide).unsqueeze(1)
            part = _Chunk(
                hidden[here], weight, bias, targets[here], temperature[here], ctx.over, ctx.kernels, peak[here]
            )
            slope = part.slope(total[here], scale)
            del part
            if grad_bias is not None:
                grad_bias += slope.sum(dim=0, dtype=wide)
            if grad_hidden is not None:
                grad_hidden[here] = slope @ weight
            if grad_weight is not None:
                _add_product(grad_weight, slope, hidden[here])
            del slope
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            *(None,) * 5,
        )
