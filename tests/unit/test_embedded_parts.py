"""Block pool, scheduler, sampler and stop search, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from embedded_rig import characters, request
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sluice.errors import EngineError
from sluice.rollout.engines.base import Finish
from sluice.rollout.engines.embedded.kv import ROOT, BlockPool
from sluice.rollout.engines.embedded.sampler import draw, kept, uniforms
from sluice.rollout.engines.embedded.scheduler import Scheduler
from sluice.rollout.engines.embedded.sequence import Sequence
from sluice.rollout.engines.embedded.stop import StopText
from sluice.types import SamplingParams, Version

# ── block pool ──────────────────────────────────────────────────────────────────────────────────────────


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Allocate and register all whole blocks of `tokens`."""
    blocks, uid = [], ROOT
    for at in range(0, len(tokens), pool.block_tokens):
        blocks.append(pool.allocate())
        uid = pool.register(blocks[-1], uid, tokens[at : at + pool.block_tokens])
    return blocks


def test_a_prefix_is_found_shared_kept_and_evicted_tail_first():
    pool = BlockPool(4, 2)
    blocks = fill(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4, 5], 4).blocks == blocks
    assert pool.match([1, 2, 3, 4, 5], 3).blocks == blocks[:1]
    assert pool.match([9, 2, 3, 4], 4).blocks == []
    pool.share(blocks)
    assert [pool.references(block) for block in blocks] == [2, 2]
    pool.release(blocks)
    pool.release(blocks)
    assert pool.num_free == 4
    taken = [pool.allocate() for _ in range(3)]
    assert blocks[1] in taken
    assert blocks[0] not in taken
    assert pool.match([1, 2, 3, 4], 4).blocks == blocks[:1]


def test_equal_tokens_after_different_prefixes_are_different_blocks():
    pool = BlockPool(8, 2)
    first, second = fill(pool, [1, 1, 5, 5]), fill(pool, [2, 2, 5, 5])
    assert pool.match([2, 2, 5, 5], 4).blocks == second
    assert pool.match([1, 1, 5, 5], 4).blocks == first


def test_invalidate_forgets_prefixes_and_keeps_holders():
    pool = BlockPool(4, 2)
    held, dropped = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(dropped)
    pool.invalidate()
    assert pool.match([1, 2], 2).blocks == pool.match([3, 4], 2).blocks == []
    assert pool.num_used == 1
    pool.release(held)
    assert pool.num_free == 4
    with pytest.raises(EngineError, match="all 4 KV blocks are held"):
        [pool.allocate() for _ in range(5)]


@given(st.data())
def test_scheduling_any_mix_ends_and_leaks_nothing(data: st.DataObject):
    pool = BlockPool(data.draw(st.integers(6, 12)), 4)
    scheduler = Scheduler(pool, max_running=3, prefill_tokens=16, context_length=24)
    draw_length = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1))
    left = {}
    for number, (context, new, first) in enumerate(data.draw(st.lists(draw_length, min_size=1, max_size=8))):
        asked = request(str(number), [first] * context, max_new_tokens=new)
        seq = Sequence(asked, max_tokens=context + new, stop_text=None)
        scheduler.add(seq)
        left[seq.rid] = seq
    for _ in range(2000):
        if scheduler.idle:
            break
        for chunk in scheduler.schedule():
            seq = chunk.seq
            assert len(seq.blocks) * 4 >= chunk.end
            assert list(scheduler.table[seq.row, : len(seq.blocks)]) == seq.blocks
            if chunk.draws and seq.accept(1, -1.0, -1.0, Version(0)) is Finish.LENGTH:
                scheduler.remove(left.pop(seq.rid))
        if data.draw(st.integers(0, 9)) == 0:
            scheduler.retract()
    assert not left
    assert pool.num_used == 0


# ── sampler ─────────────────────────────────────────────────────────────────────────────────────────────


def test_noise_is_uniform_and_depends_on_key_and_position():
    keys = np.repeat(np.arange(300, dtype=np.uint64), 300)
    positions = np.tile(np.arange(300), 300)
    noise = uniforms(keys, positions)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert len(np.unique(noise)) == noise.size
    counts = np.histogram(noise, 100, (0, 1))[0]
    chi_square = ((counts - 900) ** 2 / 900).sum()
    assert chi_square < 148  # 99.9 % of chi-square with 99 degrees of freedom
    grid = noise.reshape(300, 300)
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02


def test_the_largest_uniform_never_draws_a_token_without_mass():
    from sluice.rollout.engines.embedded.sampler import _invert

    cumulative = torch.tensor([[0.0, 0.4, 1.0, 1.0], [0.0, 0.1, 0.7, 0.7]], dtype=torch.float64)
    last = torch.full((2,), 1 - 2.0**-53, dtype=torch.float64)
    assert _invert(cumulative, last).tolist() == [2, 2]
    assert _invert(cumulative, torch.zeros(2, dtype=torch.float64)).tolist() == [1, 1]


@pytest.mark.parametrize("params", [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=7),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=0.9, top_k=12, top_p=0.9, min_p=0.02),
])  # fmt: skip
def test_draws_follow_the_distribution(params: SamplingParams):
    rows, vocabulary = 40_000, 24
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * 1.5
    drawn = draw(logits.expand(rows, -1), [params] * rows, np.full(rows, 11, dtype=np.uint64), np.arange(rows))
    expected = independent(logits.double().numpy(), params)
    counts = np.bincount(drawn.tokens, minlength=vocabulary)
    assert not counts[expected == 0].any()
    inside = expected > 0
    chi_square = ((counts - rows * expected)[inside] ** 2 / (rows * expected[inside])).sum()
    freedom = inside.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)
    plain = independent(logits.double().numpy(), SamplingParams(temperature=params.temperature))
    assert np.allclose(drawn.logprobs, np.log(plain)[drawn.tokens], atol=1e-5)
    assert np.allclose(drawn.sampled_logprobs, np.log(expected[drawn.tokens]), atol=1e-5)


def independent(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution after the cuts, token by token, in numpy."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    probabilities = weights / weights.sum()
    result = np.zeros_like(probabilities)
    mass = 0.0
    for rank, token in enumerate(np.argsort(-probabilities, kind="stable")):
        if params.top_k > 0 and rank >= params.top_k:
            break
        if params.top_p < 1 and mass >= params.top_p:
            break
        if probabilities[token] < params.min_p * probabilities.max():
            break
        mass += probabilities[token]
        result[token] = probabilities[token]
    return result / result.sum()


@given(st.integers(0, 2**32 - 1), st.sampled_from([-1, 1, 3, 50]), st.floats(0.05, 1), st.sampled_from([0.0, 0.2, 1.0]))
def test_supports_match_an_independent_implementation(seed: int, top_k: int, top_p: float, min_p: float):
    logits = np.random.default_rng(seed).normal(0, 2, 30)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    expected = independent(logits, params)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-probabilities, kind="stable")
    mask = kept(torch.from_numpy(probabilities[order])[None], [params])[0].numpy()
    assert set(order[mask]) == set(np.flatnonzero(expected))


def test_greedy_takes_the_likeliest_and_reports_log_probs_at_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, top_k=2)]
    drawn = draw(logits, params, np.zeros(2, dtype=np.uint64), np.zeros(2, dtype=np.int64))
    assert drawn.tokens == [1, 0]
    assert np.allclose(drawn.logprobs, torch.log_softmax(logits, -1)[[0, 1], [1, 0]].numpy())
    assert drawn.sampled_logprobs[1] == 0.0


def test_rows_draw_the_same_in_any_batch():
    logits = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    kinds = [SamplingParams(), SamplingParams(temperature=0.6, top_p=0.7), SamplingParams(temperature=0.0)]
    params = [kinds[row % 3] for row in range(60)]
    keys, positions = np.arange(60, dtype=np.uint64), np.arange(60)
    together = draw(logits, params, keys, positions)
    for row in range(60):
        part = slice(row, row + 1)
        alone = draw(logits[part], params[part], keys[part], positions[part])
        assert [values[0] for values in alone] == [values[row] for values in together]


def test_broken_logits_are_an_error():
    with pytest.raises(EngineError, match="not finite to 1 of 2"):
        draw(
            torch.tensor([[0.0, float("nan")], [0.0, 1.0]]),
            [SamplingParams()] * 2,
            np.zeros(2, dtype=np.uint64),
            np.zeros(2, dtype=np.int64),
        )


# ── stop strings ────────────────────────────────────────────────────────────────────────────────────────


def ends_at(search: StopText, tokens: list[int], start: int) -> int | None:
    for end in range(start + 1, len(tokens) + 1):
        if search.found(tokens[:end]):
            return end
    return None


def test_a_stop_string_ends_at_the_token_that_completes_it():
    tokenizer = characters()
    text = [ord(letter) - 32 for letter in "ab STOP cd"]
    assert ends_at(StopText(("STOP", "xyz"), tokenizer, 0), text, 0) == 7
    assert ends_at(StopText(("c",), tokenizer, 0), text, 0) == 9
    assert ends_at(StopText(("STOP",), tokenizer, 4), text, 4) is None  # begins in the context


def test_characters_of_several_tokens_are_waited_for():
    class Bytes:
        def decode(self, token_ids: list[int], **_: bool) -> str:
            return bytes(token_ids).decode("utf-8", errors="replace")

    text = list("xé→END".encode())
    assert ends_at(StopText(("→E",), Bytes(), 0), text, 0) == len("xé→E".encode())
    assert ends_at(StopText(("é",), Bytes(), 0), text, 0) == 3
    assert ends_at(StopText(("\ufffd",), Bytes(), 0), text, 0) is None


def test_special_tokens_are_searched_too():
    tokenizer = characters()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert ends_at(StopText(("<|end|>",), tokenizer, 0), [33, 34, end, 35], 0) == 3
