"""Chunked log-probs and entropy against float64 arithmetic without chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sluice.train.logprob import token_scores

torch.set_num_threads(1)


def _case(tokens: int, vocabulary: int, dtype: torch.dtype, bias: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": make(tokens, 6).requires_grad_(),
        "weight": make(vocabulary, 6).requires_grad_(),
        "bias": make(vocabulary).requires_grad_() if bias else None,
        "targets": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "temperature": torch.rand(tokens, generator=generator) + 0.5,
    }


def _naive(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = case["hidden"].double() @ case["weight"].double().T
    if case["bias"] is not None:
        logits = logits + case["bias"].double()
    logp = (logits / case["temperature"].double()[:, None]).log_softmax(-1)
    return logp.gather(1, case["targets"][:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_values_and_gradients(dtype: torch.dtype, close: float, chunk: int, bias: bool) -> None:
    case = _case(7, 11, dtype, bias)
    scores = token_scores(**case, chunk=chunk)
    logprob, entropy = _naive(case)
    assert scores.logprob.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(scores.logprob.double(), logprob, atol=close, rtol=close)
    torch.testing.assert_close(scores.entropy.double(), entropy.detach(), atol=close, rtol=close)
    assert not scores.entropy.requires_grad
    inputs = [case[name] for name in ("hidden", "weight", "bias") if case[name] is not None]
    slope = torch.linspace(-1, 1, 7)
    ours = torch.autograd.grad(scores.logprob @ slope.to(scores.logprob.dtype), inputs)
    theirs = torch.autograd.grad(logprob @ slope.double(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b.double(), atol=close, rtol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_the_same(dtype: torch.dtype) -> None:
    """By torch's own compiler; numbers of tokens that leave a last chunk of another size."""
    for tokens in (7, 5, 30):
        case = _case(tokens, 50, dtype, bias=True)
        inputs = [case[name] for name in ("hidden", "weight", "bias")]
        found: list[list[torch.Tensor]] = []
        for compiled in (False, True):
            scores = token_scores(**case, chunk=4, compiled=compiled)
            slopes = torch.autograd.grad((scores.logprob * torch.linspace(-1, 1, tokens)).sum(), inputs)
            found.append([scores.logprob.detach(), scores.entropy, *slopes])
        for plain, fused in zip(*found, strict=True):
            torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 8e-3)


def test_gradcheck() -> None:
    case = _case(5, 7, torch.float64, bias=True)
    case["temperature"] = case["temperature"].double()

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return token_scores(hidden, weight, bias, case["targets"], case["temperature"], chunk=2).logprob

    assert torch.autograd.gradcheck(logprob, (case["hidden"], case["weight"], case["bias"]))


def test_softmax_is_float32_in_bfloat16() -> None:
    """4,096 equal logits: a bfloat16 sum would stall, float32 gives log(1/4096) to its own precision."""
    hidden, weight = torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(4096, 2, dtype=torch.bfloat16)
    scores = token_scores(hidden, weight, None, torch.zeros(1, dtype=torch.long), torch.ones(1), chunk=1)
    expected = torch.log(torch.tensor([4096.0]))
    torch.testing.assert_close(scores.logprob, -expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.entropy, expected, atol=1e-6, rtol=0)


def test_large_logits_and_no_tokens() -> None:
    hidden = torch.tensor([[1e4]])
    scores = token_scores(hidden, torch.tensor([[1.0], [-1.0]]), None, torch.tensor([0]), torch.ones(1), chunk=4)
    assert float(scores.logprob) == 0.0
    assert float(scores.entropy) == 0.0
    none = token_scores(hidden[:0], torch.ones(2, 1), None, torch.zeros(0, dtype=torch.long), torch.ones(0), chunk=4)
    assert none.logprob.shape == (0,)
