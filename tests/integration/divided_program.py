"""Two ranks share a vocabulary, then the tokens of every sample; each compares what it has with the undivided.

    python -m tests.integration.divided_program FOLDER

A rank whose numbers differ ends with a traceback, and the program with 1.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.nn.functional import scaled_dot_product_attention

from sluice.config.megatron import MegatronConfig
from sluice.train.backends.megatron import shim
from sluice.train.backends.megatron.division import context_group, divide, tensor_group
from sluice.train.backends.megatron.packs import Grid, Packed, across_ranks, pad
from sluice.train.logprob import token_scores

WIDE: dict[str, Any] = {"dtype": torch.float64}


def same(found: Tensor | None, wanted: Tensor | None) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def vocabulary(rank: int) -> None:
    """Values, entropy and every gradient; rows of one token and of none at a rank, and temperatures that differ."""
    divide(MegatronConfig(tp=2), seed=0)
    torch.manual_seed(0)
    for tokens, chunk in ((11, 4), (1, 8), (0, 4)):
        hidden, weight = torch.randn(tokens, 6, **WIDE), torch.randn(14, 6, **WIDE) * 3
        bias, temperature = torch.randn(14, **WIDE), torch.rand(tokens, **WIDE) + 0.5
        targets = torch.randint(0, 14, (tokens,))
        targets[: tokens // 2] = 13  # all at the second rank
        pull = torch.randn(tokens, **WIDE)
        whole = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
        logits = (whole[0] @ whole[1].T + whole[2]) / temperature.unsqueeze(1)
        wanted = logits.log_softmax(1)
        chosen = wanted.gather(1, targets.unsqueeze(1)).squeeze(1)
        (chosen * pull).sum().backward()
        part = slice(7 * rank, 7 * rank + 7)
        mine = [each.clone().requires_grad_() for each in (hidden, weight[part], bias[part])]
        scores = token_scores(mine[0], mine[1], mine[2], targets, temperature, chunk=chunk, over=tensor_group())
        same(scores.logprob, chosen)
        same(scores.entropy, -(wanted.exp() * wanted).sum(1))
        (scores.logprob * pull).sum().backward()
        share = mine[0].grad
        assert share is not None
        dist.all_reduce(share)
        same(share, whole[0].grad)
        for found, other in zip(mine[1:], whole[1:], strict=True):
            assert other.grad is not None
            same(found.grad, other.grad[part])


def attention(rank: int) -> None:
    """One sample is longer than the rows that are masked at one time."""
    from sluice.train.backends.megatron.attention import PackedAttention

    divide(MegatronConfig(cp=2), seed=0)
    torch.manual_seed(0)
    grid, heads, groups, size = Grid(2, context_group().rank()), 4, 2, 8
    padded = pad((1100, 3, 16, 1), grid)
    lengths, mine = padded.lengths, torch.from_numpy(padded.owned[rank])
    total = sum(lengths)
    states = [torch.randn(total, count, size, **WIDE) for count in (heads, groups, groups)]
    angles = torch.randn(total, 1, size // 2, **WIDE).repeat(1, 1, 2)
    pull = torch.randn(total, heads * size, **WIDE)
    cos, sin = angles.cos(), angles.sin()
    whole = [each.clone().requires_grad_() for each in states]
    wanted = one_by_one(whole, cos, sin, lengths)
    (wanted * pull).sum().backward()
    config: Any = SimpleNamespace(compile_small=False, interleaved=False, attention_kernel="cudnn")
    layer = PackedAttention(config, 1, None, "self", softmax_scale=0.3)
    local = [each[mine].clone().requires_grad_() for each in states]
    met = across_ranks(padded, grid, torch.device("cpu"))
    pack = Packed(qkv_format="thd", cos=cos[mine], sin=sin[mine], lengths=lengths, across=met)
    found = layer(*local, None, packed_seq_params=pack)
    same(found, wanted[mine])
    (found * pull[mine]).sum().backward()
    for ours, theirs in zip(local, whole, strict=True):
        assert theirs.grad is not None
        same(ours.grad, theirs.grad[mine])


def one_by_one(states: list[Tensor], cos: Tensor, sin: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Each sample alone, its scores whole."""

    def turned(each: Tensor) -> Tensor:
        half = each.shape[-1] // 2
        return each * cos + torch.cat((-each[..., half:], each[..., :half]), -1) * sin

    query, key, value = turned(states[0]), turned(states[1]), states[2]
    outputs = [
        scaled_dot_product_attention(
            *(each.transpose(0, 1) for each in parts), is_causal=True, scale=0.3, enable_gqa=True
        )
        for parts in zip(*(each.split(list(lengths)) for each in (query, key, value)), strict=True)
    ]
    return torch.cat([output.transpose(0, 1) for output in outputs]).flatten(1)


def run_rank(rank: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    shim.install()
    store = FileStore(str(meeting), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    vocabulary(rank)
    attention(rank)
    dist.destroy_process_group()


def main() -> None:
    other = os.fork()
    run_rank(int(other == 0), Path(sys.argv[1]) / "meeting")
    if other:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))


if __name__ == "__main__":
    main()
