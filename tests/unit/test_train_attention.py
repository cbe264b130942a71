"""A pack is what its samples are alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_cases import make_samples, padded_logprobs, plain_model, scratch

from sluice.errors import TrainError
from sluice.models.build import load_model
from sluice.train.attention import PACKED_ATTENTION, packed_attention
from sluice.train.buckets import Bucket, layout
from sluice.train.packed_model import PackedModel, choose_attention, make_pack
from sluice.types import MicroBatch

torch.set_num_threads(1)
CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scratch(tmp_path_factory.mktemp(request.param), **FAMILIES[request.param])


def _scores(model: PackedModel, samples: list[Any]) -> torch.Tensor:
    micro = MicroBatch(tuple(samples), np.zeros(sum(map(len, samples))))
    return model.scores(make_pack(micro, micro.stream("weight") > 0, CPU)).logprob


@pytest.mark.parametrize("lengths", [[9], [6, 6, 6], [40, 12, 7, 2], [7, 300, 2, 31]])
def test_packed_equals_alone_and_plain_transformers(folder: Path, lengths: list[int]) -> None:
    model = PackedModel(load_model(folder, dtype="float32", attn_implementation=PACKED_ATTENTION).double(), chunk=50)
    samples = make_samples(lengths)
    packed = _scores(model, samples)
    alone = torch.cat([_scores(model, [sample]) for sample in samples])
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=0)
    plain = padded_logprobs(plain_model(folder, torch.float32).double(), samples)
    trained = [values[torch.from_numpy(s.trained)] for values, s in zip(plain, samples, strict=True)]
    # Not closer, because transformers normalises and rotates in float32 whatever the parameters are.
    torch.testing.assert_close(packed, torch.cat(trained).to(packed.dtype), atol=1e-6, rtol=1e-6)


def test_packed_equals_alone_in_float32(tmp_path: Path) -> None:
    """At the usual scale of initial weights, where log-probs are of order 4, float32 agrees to 1e-6."""
    folder = scratch(tmp_path, initializer_range=0.02)
    model = PackedModel(load_model(folder, dtype="float32", attn_implementation=PACKED_ATTENTION), chunk=50)
    samples = make_samples([40, 12, 7, 2])
    alone = torch.cat([_scores(model, [sample]) for sample in samples])
    torch.testing.assert_close(_scores(model, samples), alone, atol=1e-6, rtol=0)
    plain = padded_logprobs(plain_model(folder, torch.float32), samples)
    trained = torch.cat([v[torch.from_numpy(s.trained)] for v, s in zip(plain, samples, strict=True)])
    torch.testing.assert_close(alone, trained, atol=1e-6, rtol=0)


def test_no_token_sees_another_sample(folder: Path) -> None:
    model = PackedModel(load_model(folder, dtype="float32", attn_implementation=PACKED_ATTENTION), chunk=50)
    first, second = make_samples([20, 14])
    other = make_samples([20, 14], seed=5)[0]
    count = second.num_trained_tokens
    assert torch.equal(_scores(model, [first, second])[-count:], _scores(model, [other, second])[-count:])


def test_long_samples_have_few_lengths() -> None:
    """Sixteen in an octave, none of which adds more than a sixteenth; short ones stay as they are."""
    found = {length: layout([length], CPU, rounded=True) for length in range(4_000, 16_385, 7)}
    sizes = {length: shape.buckets[0].longest for length, shape in found.items()}
    assert all(sizes[length] == length for length in sizes if length < 4_096)
    assert all(length <= size <= length * 17 / 16 for length, size in sizes.items())
    assert len({size for length, size in sizes.items() if length > 4_096}) == 32
    assert all(shape.longest == length for length, shape in found.items())  # what a sliding window is compared with
    assert layout([4_096, 4_096], CPU, rounded=True).moves is None
    assert layout([5_001], CPU).buckets == (Bucket(1, 5_001),)


def test_padding_of_long_samples_changes_nothing() -> None:
    torch.manual_seed(0)
    lengths = [4_100, 30, 4_099, 4_200]
    states = [torch.randn(1, heads, sum(lengths), 4, dtype=torch.float64) for heads in (2, 1, 1)]
    found: list[list[torch.Tensor]] = []
    for rounded in (True, False):
        q, k, v = (each.clone().requires_grad_() for each in states)
        shape = layout(lengths, CPU, rounded=rounded)
        assert shape.buckets == ((Bucket(3, 4_352), Bucket(1, 30)) if rounded else (Bucket(3, 4_200), Bucket(1, 30)))
        output, _ = packed_attention(torch.nn.Module(), q, k, v, None, pack=shape)
        output.square().sum().backward()
        found.append([output, *(each.grad for each in (q, k, v) if each.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_layout_buckets() -> None:
    same = layout([4, 4, 4], CPU)
    assert same.buckets == (Bucket(3, 4),)
    assert same.moves is None
    mixed = layout([30, 2000, 10, 20], CPU)
    assert mixed.buckets == (Bucket(1, 2000), Bucket(3, 30))
    assert mixed.moves is not None
    assert torch.equal(mixed.moves.gather[mixed.moves.scatter], torch.arange(2060))
    assert int(mixed.moves.real.sum()) == 2060
    assert mixed.moves.gather[2000:2030].tolist() == list(range(30))  # the longest of its bucket comes first
    assert mixed.moves.gather[-30:].tolist() == [*range(2030, 2040), *[2039] * 20]


def test_padding_passes_gradients_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, 9, 4, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)
    ]
    module = torch.nn.Module()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return packed_attention(module, q, k, v, None, pack=layout([4, 3, 2], CPU))[0]

    assert torch.autograd.gradcheck(attend, states)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"pack": None}, "did not pass on"),
        ({"softcap": 30.0}, "logit softcapping"),
        ({"s_aux": torch.ones(2)}, "attention sinks"),
        ({"sliding_window": 4}, "sliding window of Module is 4"),
    ],
)
def test_what_it_cannot_do_is_refused(extra: dict[str, Any], says: str) -> None:
    q = torch.zeros(1, 2, 5, 4)
    with pytest.raises(TrainError, match=says):
        packed_attention(torch.nn.Module(), q, q, q, None, **{"pack": layout([5], CPU), **extra})


@pytest.mark.parametrize(
    "family",
    [{"model_type": "granite", "logits_scaling": 3.0}, {"model_type": "cohere", "logit_scale": 0.2}],
)
def test_a_scaled_head_is_part_of_the_log_prob(family: dict[str, Any], tmp_path: Path) -> None:
    scratch(tmp_path, **family)
    model = load_model(tmp_path, dtype="float32", attn_implementation=PACKED_ATTENTION)
    assert choose_attention(model, chunk=8, longest=64) == PACKED_ATTENTION


def test_probe_finds_a_head_that_is_not_linear(tmp_path: Path) -> None:
    scratch(tmp_path, model_type="gemma2", final_logit_softcapping=2.0, attn_logit_softcapping=None)
    model = load_model(tmp_path, dtype="float32", attn_implementation=PACKED_ATTENTION)
    with pytest.raises(TrainError, match="gives other log-probs in a pack than alone"):
        choose_attention(model, chunk=8, longest=64)
