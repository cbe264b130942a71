"""What samples begin with in common is computed once, and nothing but the work differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import FAMILIES, ONE_AT_A_TIME, family
from train_cases import make_samples

from sluice.models.build import load_model
from sluice.train.attention import PACKED_ATTENTION, packed_attention
from sluice.train.backends.critic import ValueModel
from sluice.train.buckets import layout
from sluice.train.packed_model import Pack, PackedModel, choose_attention, make_pack, shares_prompts
from sluice.train.prefixes import first_copies
from sluice.types import MicroBatch, TrainSample

torch.set_num_threads(1)
CPU = torch.device("cpu")
CASES: dict[str, tuple[list[int], list[tuple[int, int, int]]]] = {
    "a group": ([20, 14, 33, 20], [(0, 1, 9), (0, 2, 9), (0, 3, 9)]),
    "a prompt of one token": ([5, 4, 6], [(0, 1, 1), (0, 2, 1)]),
    "identical samples": ([12, 12, 12], [(0, 1, 12), (0, 2, 12)]),
    "one sample begins another": ([12, 30], [(1, 0, 12)]),
    "two groups and a stranger": ([15, 18, 7, 15, 22], [(0, 3, 8), (1, 4, 11)]),
    "forks of forks": ([40, 30, 35, 26, 40], [(0, 1, 8), (0, 2, 20), (2, 3, 24), (0, 4, 33)]),
}
"""Lengths, and copies `(from, to, tokens)` of beginnings made in this order."""


def _samples(case: str) -> list[TrainSample]:
    lengths, copied = CASES[case]
    samples = make_samples(lengths)
    for source, target, tokens in copied:
        samples[target].ids[:tokens] = samples[source].ids[:tokens]
    return samples


def _packs(samples: Sequence[TrainSample]) -> tuple[Pack, Pack]:
    """The pack as it is made, and one in which every token is computed."""
    micro = MicroBatch(tuple(samples), np.zeros(sum(map(len, samples))))
    shared = make_pack(micro, micro.stream("weight") > 0, CPU)
    return shared, replace(shared, layout=layout(micro.lengths, CPU))


def _gradients(module: torch.nn.Module, values: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    slope = torch.linspace(-1.0, 2.0, len(values))
    (values * slope).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error, size = float((found - expected).detach().norm()), float(expected.detach().norm())
    assert error <= 1e-5 * size, (name, error, size)


def _distinct_beginnings(samples: Sequence[TrainSample]) -> int:
    return len({tuple(s.ids[: end + 1].tolist()) for s in samples for end in range(len(s))})


@pytest.mark.parametrize("case", CASES)
def test_every_beginning_has_one_row(case: str) -> None:
    samples = _samples(case)
    copies = first_copies([sample.ids for sample in samples])
    assert copies is not None
    beginnings = [tuple(s.ids[: end + 1].tolist()) for s in samples for end in range(len(s))]
    assert [beginnings[place] for place in copies] == beginnings
    assert len(set(copies.tolist())) == len(set(beginnings))
    assert np.array_equal(copies[copies], copies)


def test_little_in_common_is_not_worth_it() -> None:
    samples = make_samples([40, 40])
    samples[1].ids[:4] = samples[0].ids[:4]
    samples[1].ids[4] = samples[0].ids[4] + 1
    assert first_copies([sample.ids for sample in samples]) is None
    assert first_copies([samples[0].ids]) is None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_all_tokens(tmp_path: Path, name: str, case: str) -> None:
    model = load_model(family(tmp_path, name), dtype="float32", attn_implementation=PACKED_ATTENTION).eval()
    packed = PackedModel(model, chunk=7)
    samples = _samples(case)
    shared, whole = _packs(samples)
    rows: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, given, _o: rows.append(given[0].numel()))
    found = packed.scores(shared)
    gradients = _gradients(model, found.logprob)
    hook.remove()
    assert rows == [_distinct_beginnings(samples)]
    expected = packed.scores(whole)
    _assert_close(found.logprob, expected.logprob, "log-probs")
    _assert_close(found.entropy, expected.entropy, "entropy")
    theirs = _gradients(model, expected.logprob)
    assert gradients.keys() == theirs.keys()
    for parameter, gradient in gradients.items():
        _assert_close(gradient, theirs[parameter], parameter)


def test_values_of_a_critic_are_those_of_all_tokens(tmp_path: Path) -> None:
    layers: Any = load_model(family(tmp_path, "qwen3"), dtype="float32", attn_implementation=PACKED_ATTENTION).model
    critic = ValueModel(layers, torch.nn.Linear(layers.config.hidden_size, 1))
    shared, whole = _packs(_samples("forks of forks"))
    found = critic.values(shared)
    gradients = _gradients(critic, found)
    expected = critic.values(whole)
    _assert_close(found, expected, "values")
    theirs = _gradients(critic, expected)
    for parameter, gradient in gradients.items():
        _assert_close(gradient, theirs[parameter], parameter)


@pytest.mark.parametrize("name", ["mistral", "qwen3_next"])
def test_models_that_run_sample_by_sample_compute_every_token(tmp_path: Path, name: str) -> None:
    assert name in ONE_AT_A_TIME
    model = load_model(family(tmp_path, name), dtype="float32", attn_implementation="eager").eval()
    assert choose_attention(model, chunk=64, longest=64) != PACKED_ATTENTION
    packed = PackedModel(model, chunk=64)
    shared, whole = _packs(_samples("a group"))
    assert shared.layout.sharing is not None
    assert torch.equal(packed.scores(shared).logprob, packed.scores(whole).logprob)


def test_gradients_of_shared_rows_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    copies = np.array([0, 1, 2, 3, 0, 1, 6, 0, 1, 6])
    shape = layout([4, 3, 3], CPU, copies)
    assert shape.sharing is not None
    assert shape.sharing.tokens.tolist() == [0, 1, 2, 3, 6]
    states = [
        torch.randn(1, heads, 5, 4, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)
    ]
    module = torch.nn.Module()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return packed_attention(module, q, k, v, None, pack=shape)[0]

    assert attend(*states).shape == (1, 5, 4, 4)
    assert torch.autograd.gradcheck(attend, states)


@pytest.mark.parametrize(
    ("word", "on_a_cpu", "elsewhere"), [("auto", True, False), ("always", True, True), ("never", False, False)]
)
def test_where_beginnings_are_shared(word: str, on_a_cpu: bool, elsewhere: bool) -> None:
    assert shares_prompts(word, CPU) is on_a_cpu
    assert shares_prompts(word, torch.device("cuda", 0)) is elsewhere
    samples = _samples("two groups and a stranger")
    micro = MicroBatch(tuple(samples), np.zeros(sum(map(len, samples))))
    pack = make_pack(micro, micro.stream("weight") > 0, CPU, share=on_a_cpu)
    assert (pack.layout.sharing is not None) is on_a_cpu
