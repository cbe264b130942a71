"""Megatron's norm and rotary embedding are transformers' own, and storages come back as they left. No ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron_models import config_of
from torch import Tensor
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from sluice.train.backends.megatron.norm import root_mean_square, rotate
from sluice.train.backends.megatron.offload import HostStorages
from sluice.train.backends.megatron.rotary import Angles
from sluice.train.compiled import over_tokens

CPU = torch.device("cpu")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPE: dict[str, dict[str, Any]] = {
    "default": {}, "linear": {"factor": 2.0}, "llama3": {"factor": 8.0, **LLAMA3},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


MODELS = {"llama": modeling_llama, "qwen3": modeling_qwen3, "glm4": modeling_glm4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = modeling_qwen3.Qwen3RMSNorm(24, eps=1e-3).to(dtype)
    torch.nn.init.normal_(theirs.weight)
    states = (torch.randn(7, 2, 24) * 3).to(dtype).requires_grad_()
    again = states.detach().clone().requires_grad_()
    weight = theirs.weight.detach().clone().requires_grad_()
    ours, wanted = root_mean_square(states, weight, 1e-3), theirs(again)
    assert ours.dtype == dtype
    assert torch.equal(ours, wanted)
    ours.float().square().sum().backward()
    wanted.float().square().sum().backward()
    for mine, other in ((states.grad, again.grad), (weight.grad, theirs.weight.grad)):
        torch.testing.assert_close(mine, other)


def test_norm_in_float64_stays_so() -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    wanted = states / (states.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(root_mean_square(states, weight, 1e-5), wanted, rtol=1e-13, atol=0)


def test_one_kernel_serves_any_number_of_tokens() -> None:
    """One for each kind of states, with gradients and without."""
    made: list[Any] = []
    kinds = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    torch.manual_seed(0)
    norm, turn = over_tokens(root_mean_square, backend), over_tokens(rotate, backend)
    weights = {size: torch.nn.Parameter(torch.randn(size)) for size in (24, 8)}
    for number, tokens in enumerate((7, 5, 2, 30)):
        cos, sin = torch.randn(tokens, 1, 8), torch.randn(tokens, 1, 8)
        for shape in ((1, 24), (4, 8), (2, 8)):
            states = torch.randn(tokens, *shape, requires_grad=True)
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    weight = weights[shape[1]]
                    assert torch.equal(norm(states, weight, 1e-5), root_mean_square(states, weight, 1e-5))
                    if shape[1] == 8:
                        assert torch.equal(turn(states, cos, sin, False), rotate(states, cos, sin, False))
        if number == 0:
            kinds = len(made)
            assert kinds <= 2 * (3 + 2)
    assert len(made) == kinds


def theirs(variant: str, config: Any, q: Tensor, k: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated `[tokens, heads, head_dim]` by the functions of transformers' model."""
    module: Any = MODELS[variant]
    cos, sin = getattr(module, f"{variant.capitalize()}RotaryEmbedding")(config=config)(q, at.unsqueeze(0))
    across = (states.transpose(0, 1).unsqueeze(0) for states in (q, k))
    q, k = module.apply_rotary_pos_emb(*across, cos, sin)
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("variant", ["llama", "qwen3", "glm4"])
def test_rotary_by_type_and_family(variant: str, kind: str) -> None:
    """GLM-4 rotates half of each head, and neighbours together."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPE[kind]}
    if variant == "glm4":
        rope["partial_rotary_factor"] = 0.5
    config = config_of(variant, rope_parameters=rope, head_dim=16, max_position_embeddings=256)
    interleaved = variant == "glm4"
    at = torch.tensor([0, 1, 2, 63, 64, 200, 5, 0])
    cos, sin = Angles(config, CPU, interleaved=interleaved, dtype=torch.float32)(at)
    assert cos.shape == sin.shape == (8, 1, 8 if interleaved else 16)
    torch.manual_seed(0)
    q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16)
    for mine, other in zip(
        (rotate(each, cos, sin, interleaved) for each in (q, k)), theirs(variant, config, q, k, at), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    if interleaved:
        assert torch.equal(rotate(q, cos, sin, interleaved)[..., 8:], q[..., 8:])


def test_types_differ() -> None:
    """So that the test above tells them apart."""
    at = torch.tensor([70, 200])
    found = [
        Angles(
            config_of("llama", rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **more}, head_dim=16),
            CPU, interleaved=False, dtype=torch.float32,
        )(at)[0]
        for kind, more in ROPE.items()
    ]  # fmt: skip
    assert all(not torch.allclose(a, b, atol=1e-3) for n, a in enumerate(found) for b in found[:n])


# ── storages ───────────────────────────────────────────────────────────────────────────────────────────────


def test_views_survive_and_scratch_is_zeros() -> None:
    torch.manual_seed(0)
    buffer, gradients, alone = torch.randn(24), torch.randn(24), torch.randn(3, 4, dtype=torch.bfloat16)
    first, second = buffer[:12].view(3, 4), buffer[12:].view(4, 3).T
    view = gradients[6:12]
    wanted = [each.clone() for each in (first, second, alone)]
    host = HostStorages(CPU)
    for _ in range(3):
        assert not host.away
        host.take([first, second, alone, buffer], [gradients, view])
        host.take([first], [])
        assert host.away
        assert all(each.untyped_storage().nbytes() == 0 for each in (buffer, alone, gradients))
        for tensor, before in zip((first, second, alone), wanted, strict=True):
            assert torch.equal(host.there(tensor), before)
        host.give_back()
        host.give_back()
        for tensor, before in zip((first, second, alone), wanted, strict=True):
            assert torch.equal(tensor, before)
            assert host.there(tensor) is tensor
        assert torch.equal(buffer[:12].view(3, 4), first)
        assert not view.any()
        first += 1  # what changes between switches is what comes back
        gradients.fill_(2.0)
        wanted[0] += 1


def test_what_leaves_is_what_is_there_then() -> None:
    kept, other = torch.arange(4.0), torch.arange(6.0)
    host = HostStorages(CPU)
    host.take([kept])
    assert torch.equal(host.there(other), torch.arange(6.0)), "it never left"
    host.give_back()
    kept.neg_()
    host.take([other, kept])
    assert torch.equal(host.there(kept), -torch.arange(4.0))
    host.give_back()
    assert torch.equal(kept, -torch.arange(4.0))
    assert torch.equal(other, torch.arange(6.0))
