"""Recorded experts are trained through: the trainer's own give its own log-probs, others those of a forced forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import MOE, family
from torch.nn.functional import linear
from train_cases import make_samples, padded_logprobs, plain_model, ratio_loss
from worked import sampled

from sluice.config.train import TrainConfig
from sluice.errors import TrainError
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import (
    Episode,
    Fork,
    Normaliser,
    Outcome,
    Prompt,
    Routes,
    Segment,
    TrainSample,
    Turn,
    Version,
    expand,
    observed,
)

torch.set_num_threads(1)
LENGTHS = (12, 30, 7, 18)
PROXIMAL = frozenset({"proximal"})
REPLAYED = (*MOE, "glm_moe_dsa")


@pytest.fixture(scope="module", params=REPLAYED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp(request.param), request.param)


def _trainer(folder: Path, **config: Any) -> TorchTrainer:
    given = {"micro_batch_tokens": 64, "logprob_chunk": 16, "routing_replay": True, **config}
    return TorchTrainer(TrainConfig.model_validate(given), folder, total_steps=10, seed=0)


def _routers(model: Any) -> list[tuple[int, Any]]:
    return [(n, layer.mlp.gate) for n, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]


def _own_routes(folder: Path, samples: Sequence[TrainSample]) -> list[np.ndarray]:
    """What plain transformers chooses, `[length, layers, top_k]` each; dense layers hold zeros, as a record does."""
    model = plain_model(folder, torch.float32)
    chosen: dict[int, torch.Tensor] = {}
    for layer, router in _routers(model):
        router.register_forward_hook(lambda _, __, output, layer=layer: chosen.__setitem__(layer, output[2]))
    tables: list[np.ndarray] = []
    for sample in samples:
        with torch.no_grad():
            model(input_ids=torch.from_numpy(sample.ids.astype(np.int64))[None])
        table = np.zeros((len(sample), model.config.num_hidden_layers, model.config.num_experts_per_tok), np.int16)
        for layer, experts in chosen.items():
            table[:, layer] = experts.numpy()
        tables.append(table)
    return tables


def _with(sample: TrainSample, table: np.ndarray, *cuts: int) -> TrainSample:
    """The table as a record, in parts that begin at `cuts`; the last position is never recorded."""
    edges = [*cuts, len(sample) - 1] if cuts else [0, len(sample) - 1]
    routes = tuple(Routes(a, table.shape[1], table.shape[2], table[a:b].reshape(-1)) for a, b in pairwise(edges))
    return replace(sample, routes=routes)


def _forced(model: Any, table: np.ndarray) -> None:
    """Give the routers of a plain model these experts, weighed by the published formulas of each family."""
    family_name = model.config.model_type

    def make(router: Any, experts: torch.Tensor) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor) -> Any:
            states = hidden.reshape(-1, hidden.shape[-1])
            logits = linear(states.float(), router.weight.float())
            scores = logits.softmax(-1) if family_name == "qwen3_moe" else logits.sigmoid()
            weights = scores.gather(1, experts)
            weights = weights / weights.sum(1, keepdim=True)
            return logits, weights * getattr(model.config, "routed_scaling_factor", 1.0), experts

        return forward

    for layer, router in _routers(model):
        router.forward = make(router, torch.from_numpy(table[:, layer].astype(np.int64)))


def test_its_own_experts_change_nothing(folder: Path) -> None:
    samples = make_samples(LENGTHS)
    recorded = [_with(s, t, 0, 4) for s, t in zip(samples, _own_routes(folder, samples), strict=True)]
    free = _trainer(folder, routing_replay=False).score(samples, PROXIMAL)
    bound = _trainer(folder).score(recorded, PROXIMAL)
    for a, b in zip(free, bound, strict=True):
        np.testing.assert_allclose(a["proximal"], b["proximal"], atol=1e-6, rtol=0)
        assert b.routes
    stats = _trainer(folder).step(make_batch(recorded, budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    assert stats.metrics["routing/agreement"] == 1.0
    assert stats.metrics["routing/recorded"] == 1.0


def test_other_experts_give_what_a_forced_forward_gives_and_train_the_router(folder: Path) -> None:
    samples = make_samples(LENGTHS)
    rng = np.random.default_rng(1)
    tables = _own_routes(folder, samples)
    for table in tables:
        for at in np.ndindex(table.shape[:2]):
            table[at] = rng.permutation(6)[: table.shape[2]]
        table[-1] = 0  # no record: nothing depends on the last position
    recorded = [_with(s, t) for s, t in zip(samples, tables, strict=True)]
    trainer = _trainer(folder)
    scored = trainer.score(recorded, PROXIMAL)
    model = plain_model(folder, torch.float32)
    losses = []
    for sample, table, ours in zip(samples, tables, scored, strict=True):
        table[-1] = rng.permutation(6)[: table.shape[2]]
        _forced(model, table)
        (expected,) = padded_logprobs(model, [sample])
        there = torch.from_numpy(sample.trained)
        np.testing.assert_allclose(ours["proximal"][sample.trained], expected.detach()[there], atol=5e-6, rtol=0)
        losses.append(
            (-torch.from_numpy(sample["advantage"]) * (expected - torch.from_numpy(sample["behaviour"])).exp())[there]
        )
    torch.cat(losses).mean().backward()
    for config in ({}, {"activation_checkpointing": True}):
        batch = make_batch(recorded, budget=64, normaliser=Normaliser.TOKEN)
        gradients = _trainer(folder, **config).gradients(batch, ratio_loss)
        for name, parameter in model.named_parameters():
            if "gate.weight" in name or name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"):
                assert parameter.grad is not None
                error = float((gradients[name] - parameter.grad).norm() / parameter.grad.norm())
                assert error <= 5e-5, f"{name}: {error}"
    stats = trainer.step(make_batch(recorded, budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    assert 0 < stats.metrics["routing/agreement"] < 0.7
    assert stats.metrics["routing/recorded"] == 1.0


def test_positions_without_a_record_route_themselves(folder: Path) -> None:
    (sample,) = make_samples([20])
    (table,) = _own_routes(folder, [sample])
    (free,) = _trainer(folder, routing_replay=False).score([sample], PROXIMAL)
    late = _with(sample, table, 12)
    (bound,) = _trainer(folder).score([late], PROXIMAL)
    np.testing.assert_allclose(free["proximal"], bound["proximal"], atol=1e-6, rtol=0)
    stats = _trainer(folder).step(make_batch([late], budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    predicted_by = np.flatnonzero(sample.trained) - 1
    assert stats.metrics["routing/recorded"] == pytest.approx((predicted_by >= 12).mean())


def test_bad_records_are_refused(folder: Path) -> None:
    trainer = _trainer(folder)
    (sample,) = make_samples([9])
    with pytest.raises(TrainError, match="segment 0 of episode e0 has no record of the experts"):
        trainer.score([sample], PROXIMAL)
    for shape, says in (((9, 3, 2), "3 layers and 2 experts"), ((9, 2, 4), "2 layers and 4 experts")):
        with pytest.raises(TrainError, match=says):
            trainer.score([_with(sample, np.zeros(shape, np.int16))], PROXIMAL)
    with pytest.raises(TrainError, match="names the expert 60"):
        trainer.score([_with(sample, np.full((9, 2, 2), 60, np.int16))], PROXIMAL)


def test_a_dense_model_and_a_router_of_another_kind_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(TrainError, match="Qwen3ForCausalLM has no routers"):
        _trainer(family(tmp_path / "dense", "qwen3"))
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    def sorting(self: Any, hidden: torch.Tensor) -> Any:
        logits = linear(hidden, self.weight)
        best = logits.softmax(-1).sort(descending=True)
        return logits, best.values[:, : self.top_k], best.indices[:, : self.top_k]

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", sorting)
    with pytest.raises(TrainError, match="does not choose by topk over its 6 experts"):
        _trainer(family(tmp_path / "sorting", "qwen3_moe"))


def _turn(ids: list[int], start: int, experts: list[int]) -> Turn:
    turn = sampled(ids, [-1.0] * len(ids), [(0, len(ids), Version(0))], 1.0)
    return replace(turn, routes=Routes(start, 1, 1, np.array(experts, np.int16)))


def test_a_forked_segment_has_its_parents_experts_up_to_the_fork() -> None:
    parent = Segment((observed([5, 6]), _turn([7, 8], 0, [1, 2, 3]), observed([9]), _turn([10], 3, [4, 5])))
    child = Segment((observed([11]), _turn([12, 13], 2, [6, 7, 8])), Fork(0, 3, "edit"))
    prompt = Prompt("p", "t", ())
    episode = Episode("e", "g", prompt, (parent, child), Outcome.COMPLETED)
    first, second = expand(episode)
    assert [(each.start, each.end, each.experts.tolist()) for each in first.routes] == [
        (0, 3, [1, 2, 3]),
        (3, 5, [4, 5]),
    ]
    # The child asked again from position 2 on: what came later counts.
    assert [(each.start, each.end) for each in second.routes] == [(0, 3), (2, 5)]
    assert second.with_streams(proximal=np.zeros(len(second))).routes == second.routes
