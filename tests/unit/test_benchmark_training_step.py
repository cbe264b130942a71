"""The benchmark of a training step: its formula, the settings that it asks for, and how it sorts kernels."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

import pytest
from benchmarks.shapes import SHAPES, parameters
from benchmarks.step_watch import Watch, by_kind
from benchmarks.training_step import Pack, samples, settings, work


def options(**changes: object) -> Namespace:
    common: dict[str, object] = {"ranks": 1, "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dtype": "float32"}
    more = {"attention": "auto", "compile": "auto", "gradients": "float32", "offload": 0.0, "logprob_chunk": 256}
    return Namespace(**{**common, **more, **changes})


def test_the_known_shapes_have_the_sizes_of_the_released_models() -> None:
    whole = {name: parameters(name)[0] for name in SHAPES if name.startswith("qwen3")}
    assert whole == {"qwen3-0.6b": 596_049_920, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360}


def test_an_embedding_that_is_not_the_head_multiplies_nothing() -> None:
    assert parameters("qwen3-8b")[1] == 8_190_735_360 - 151_936 * 4_096
    assert parameters("qwen3-4b")[1] == 4_022_468_096


def test_the_work_of_training() -> None:
    """16,384 tokens in one sequence: 6 · 4.022e9 · 16,384 and 6 · 16,384² · 32 · 128 · 36."""
    matrices, attention = 395_425_727_389_696, 237_494_511_599_616
    assert work("qwen3-4b", [16_384]) == pytest.approx(matrices + attention, rel=1e-3)
    assert work("qwen3-4b", [4_096] * 4) == pytest.approx(matrices + attention / 4, rel=1e-3)


def test_every_token_but_the_first_is_trained() -> None:
    made = samples(Pack.of("3x5").lengths(1, 0), 100)
    assert [sample.num_trained_tokens for sample in made] == [4, 4, 4]
    assert len({sample.group_id for sample in made}) == 3, "a group could be kept in one pass"


def test_lengths_that_vary_make_the_same_tokens_in_every_step() -> None:
    pack = Pack.of("8x100~")
    first, second = (pack.lengths(2, step) for step in (0, 1))
    assert first != second
    assert sum(first) == sum(second) == 1_600
    assert len(first) == 16
    assert 30 < min(first) < max(first) < 250
    assert str(pack) == "8x100~"
    assert Pack.of("2x3").lengths(2, 7) == [3] * 4


def test_recomputation_of_some_layers() -> None:
    found = settings(options(ranks=4, tp=2), "megatron", "layers:20", 64)
    assert (found.megatron.recompute, found.megatron.recompute_layers, found.megatron.tp) == ("layers", 20, 2)
    assert not settings(options(), "megatron", "none", 64).activation_checkpointing


@pytest.mark.parametrize(("backend", "recompute"), [("torch", "mlp"), ("torch", "layers:2"), ("megatron", "mlp:3")])
def test_what_a_backend_does_not_have_is_not_run(backend: str, recompute: str) -> None:
    with pytest.raises(ValueError, match="recompute"):
        settings(options(), backend, recompute, 64)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("gloo:all_reduce", "communication"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_32_64x128x128", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", "matmul"),
        ("aten::mm", "matmul"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType>", "copies"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "compiled"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor<float>>", "elementwise"),
        ("aten::mul", "elementwise"),
        ("MmBackward0", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    found = by_kind(Counter({name: 2_000_000}), Counter({name: 3}))
    assert found["seconds"] == {kind: 2.0}
    assert found["calls"] == {kind: 3}
    assert found["top"] == [{"name": name[:120], "seconds": 2.0, "calls": 3}]


def test_what_is_left_of_a_step_is_forward_and_backward() -> None:
    watch = Watch("cpu")
    optimizer = Namespace(grad_norm=lambda: sum(range(50_000)), update=lambda norm: norm + 1)
    watch.on(optimizer)
    with watch.over("step"):
        assert optimizer.update(optimizer.grad_norm()) == sum(range(50_000)) + 1
    found = watch.take()
    assert found.keys() == {"grad_norm", "update", "forward_backward"}
    assert found["grad_norm"] > 0
    assert watch.take() == {}
