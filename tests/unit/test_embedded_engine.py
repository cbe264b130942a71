"""The embedded engine against plain forward passes of the same model, and against itself in other batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from embedded_rig import (
    make,
    prompts,
    reference_logits,
    reference_logprobs,
    request,
    run_all,
    tiny,
)

from sluice.rollout.engines.base import Finish, GenerateRequest, Generation
from sluice.types import Version, VersionSpan


def same(left: list[Generation], right: list[Generation]) -> None:
    """Tokens and log-probs are equal bit by bit."""
    for one, other in zip(left, right, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.logprobs.view(np.int32), other.logprobs.view(np.int32))
        assert one.finish is other.finish


def mixed(count: int, **sampling: object) -> list[GenerateRequest]:
    return [
        request(f"r{n}", ids, noise=1000 + n, max_new_tokens=8 + n % 20, **sampling)
        for n, ids in enumerate(prompts(count))
    ]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_equal_a_plain_forward_pass(kind: str, temperature: float):
    model = tiny(kind)
    asked = mixed(12, temperature=temperature)
    for one, result in zip(asked, run_all(make(model), asked), strict=True):
        expected = reference_logprobs(model, one.ids, result.ids, temperature or 1.0)
        assert np.abs(result.logprobs - expected).max() <= 1e-6 * max(1, np.abs(expected).max())
        assert result.finish is Finish.LENGTH
        assert len(result.ids) == one.sampling.max_new_tokens
        assert result.spans == (VersionSpan(0, len(result.ids), Version(0)),)
        assert result.sampled_logprobs is None
        if temperature == 0.0:
            logits = reference_logits(model, np.concatenate([one.ids, result.ids]))[len(one.ids) - 1 : -1]
            assert np.array_equal(result.ids, logits.argmax(-1).numpy())


def test_long_contexts_in_chunks_and_tiles_equal_a_plain_forward_pass():
    model = tiny(max_position_embeddings=1024)
    asked = [request(f"r{n}", ids, max_new_tokens=40) for n, ids in enumerate(prompts(4, low=300, high=700))]
    for one, result in zip(asked, run_all(make(model, prefill_tokens=100), asked), strict=True):
        expected = reference_logprobs(model, one.ids, result.ids)
        assert np.abs(result.logprobs - expected).max() <= 1e-6 * max(1, np.abs(expected).max())


def test_sampled_log_probs_are_those_of_the_kept_set():
    model = tiny()
    asked = mixed(8, temperature=0.8, top_k=5)
    for one, result in zip(asked, run_all(make(model), asked), strict=True):
        assert result.sampled_logprobs is not None
        logits = reference_logits(model, np.concatenate([one.ids, result.ids]))[len(one.ids) - 1 : -1] / 0.8
        top = logits.topk(5)
        place = (top.indices == torch.from_numpy(result.ids.astype(np.int64))[:, None]).nonzero()
        assert len(place) == len(result.ids)
        expected = torch.log_softmax(top.values, -1)[place[:, 0], place[:, 1]].numpy()
        assert np.abs(result.sampled_logprobs - expected).max() < 1e-5
        assert np.all(result.sampled_logprobs >= result.logprobs - 1e-6)


# ── the same bits in any company ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_results_do_not_depend_on_the_batch(kind: str):
    model = tiny(kind)
    asked = mixed(64)
    together = run_all(make(model), asked)
    alone = make(model)
    same(together, [run_all(alone, [one])[0] for one in asked])
    threes = make(model)
    same(together, [r for at in range(0, 64, 3) for r in run_all(threes, asked[at : at + 3])])
    same(together, run_all(make(model), asked[::-1])[::-1])
    same(together, run_all(make(model, max_running=5), asked))
    same(together, run_all(make(model, block_tokens=8, prefill_tokens=16), asked))
    same(together, run_all(make(model, block_tokens=5), asked))


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32},
        {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "vocab_size": 1000},
        {"hidden_size": 128, "head_dim": 128, "num_key_value_heads": 4},
        {"hidden_size": 48, "head_dim": 12, "num_key_value_heads": 1, "intermediate_size": 100},
    ],
)
def test_other_sizes_do_not_depend_on_the_batch_either(sizes: dict[str, int]):
    model = tiny(**sizes)
    asked = [request(f"r{n}", ids, noise=n, max_new_tokens=50) for n, ids in enumerate(prompts(16))]
    together, engine, tight = run_all(make(model), asked), make(model), make(model, kv_tokens=256)
    same(together, [run_all(engine, [one])[0] for one in asked])
    same(together, run_all(tight, asked))  # here drawn tokens are prefilled again
    assert tight.statistics()["preemptions"] > 0


def test_long_sequences_do_not_depend_on_the_batch():
    model = tiny(max_position_embeddings=1024)
    lengths = prompts(5, low=200, high=800) + prompts(5)
    asked = [request(f"r{n}", ids, noise=n, max_new_tokens=30) for n, ids in enumerate(lengths)]
    together = run_all(make(model, kv_tokens=16384), asked)
    alone = make(model, prefill_tokens=64)
    same(together, [run_all(alone, [one])[0] for one in asked])


def test_bfloat16_does_not_depend_on_the_batch():
    model = tiny()
    asked = mixed(16)
    together, engine = run_all(make(model, dtype="bfloat16"), asked), make(model, dtype="bfloat16")
    same(together, [run_all(engine, [one])[0] for one in asked])


def test_a_continuation_draws_what_the_whole_request_would_have_drawn():
    model = tiny()
    ids = prompts(1)[0]
    whole = run_all(make(model), [request("whole", ids, max_new_tokens=40)])[0]
    for at in (1, 13, 39):
        context = np.concatenate([ids, whole.ids[:at]])
        rest = run_all(make(model), [request("rest", context, max_new_tokens=40 - at)])[0]
        assert np.array_equal(rest.ids, whole.ids[at:])
        assert np.array_equal(rest.logprobs, whole.logprobs[at:])


# ── prefixes and memory ─────────────────────────────────────────────────────────────────────────────────


def test_samples_of_one_prompt_share_its_blocks_within_one_step():
    engine = make()
    ids = np.arange(50, dtype=np.int32)
    results = run_all(engine, [request(f"r{n}", ids, noise=n, max_new_tokens=1) for n in range(8)])
    assert [result.cached_tokens for result in results] == [0] + [48] * 7
    figures = engine.statistics()
    assert figures["steps"] == 1
    assert figures["prefill_tokens"] == 50 + 7 * 2
    assert figures["cached_tokens"] == 7 * 48
    assert figures["kv_blocks_used"] == 0


def test_a_next_turn_reuses_context_and_answer_with_equal_results():
    model = tiny()
    engine = make(model)
    ids = prompts(1)[0]
    first = run_all(engine, [request("a", ids, max_new_tokens=40)])[0]
    longer = np.concatenate([ids, first.ids, [1, 2, 3]])
    second = run_all(engine, [request("b", longer)])
    assert second[0].cached_tokens == (len(longer) - 4) // 16 * 16
    fresh = run_all(make(model), [request("b", longer)])
    assert fresh[0].cached_tokens == 0
    same(second, fresh)


def test_preemption_changes_nothing_but_the_time():
    model = tiny()
    asked = [request(f"r{n}", ids, noise=n, max_new_tokens=60) for n, ids in enumerate(prompts(12))]
    roomy, tight = make(model), make(model, kv_tokens=256)
    same(run_all(roomy, asked), run_all(tight, asked))
    assert roomy.statistics()["preemptions"] == 0
    assert tight.statistics()["preemptions"] > 0
    assert tight.statistics()["kv_blocks_used"] == 0


# ── ends of turns ───────────────────────────────────────────────────────────────────────────────────────


def test_stop_ids_and_stop_strings_end_the_turn_and_are_kept():
    model = tiny()
    ids = prompts(1)[0]
    free = run_all(make(model), [request("free", ids, max_new_tokens=60)])[0]
    stop = int(free.ids[20])
    end = list(free.ids).index(stop) + 1
    result = run_all(make(model), [request("id", ids, max_new_tokens=60, stop_token_ids=(stop,))])[0]
    assert result.finish is Finish.STOP
    assert np.array_equal(result.ids, free.ids[:end])
    text = "".join(chr(32 + token) if token < 95 else "<unk>" for token in free.ids)
    word = text[30:33]
    result = run_all(make(model), [request("text", ids, max_new_tokens=60, stop=("never!", word))])[0]
    assert result.finish is Finish.STOP
    spelled = "".join(chr(32 + token) if token < 95 else "<unk>" for token in result.ids)
    assert spelled == text[: text.index(word) + len(word)]


def test_the_context_length_ends_a_turn():
    result = run_all(make(context_length=20), [request("r", range(15), max_new_tokens=50)])[0]
    assert len(result.ids) == 5
    assert result.finish is Finish.LENGTH
