"""Megatron in every layout does what the torch backend does in one process: real megatron-core, real ranks, gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.integration.megatron_rig import FAMILIES, LAYOUTS, OPTIMIZER, Rig, settings, tiny
from tests.integration.test_ranks import batch, close
from tests.unit.train_cases import make_samples, padded_logprobs, plain_model, ratio_loss

from sluice.config.train import TrainConfig
from sluice.errors import ConfigError
from sluice.train.backends.torch import TorchTrainer
from sluice.train.base import StepStats

torch.set_num_threads(1)
pytestmark = [pytest.mark.timeout(280)]
SCORED = make_samples((9, 60, 2, 33, 64), seed=5)
FIGURES = ("loss", "grad_norm", "lr", "entropy", "num_tokens", "num_trained_tokens", "skipped")
MIXED = {"tp": 2, "pp": 2}


def case(name: str, ranks: int, layout: dict[str, Any]) -> Any:
    """One family in every layout, and the others in one, run with the quick tests."""
    quick = name == "qwen3" or (ranks == 4 and layout == MIXED)
    return pytest.param(name, ranks, layout, id=f"{name}-{ranks}-{layout}", marks=[] if quick else [pytest.mark.slow])


CASES = [case(name, ranks, layout) for name in FAMILIES for ranks, layouts in LAYOUTS.items() for layout in layouts]


class Expected:
    """What one process computes: gradients, scores, three steps, and the weights after them."""

    def __init__(self, model: Path, **train: Any) -> None:
        self.model = model
        config = TrainConfig.model_validate({"optimizer": OPTIMIZER, "micro_batch_tokens": 64, **train})
        alone = TorchTrainer(config, model, total_steps=10, seed=0)
        self.gradients = alone.gradients(batch(), ratio_loss)
        self.steps = [alone.step(batch(seed=seed), ratio_loss) for seed in range(3)]
        self.weights = {name: tensor.clone() for name, tensor in alone.named_weights()}
        with torch.no_grad():
            self.scores = padded_logprobs(plain_model(model, torch.float32), SCORED)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expected]:
    folder = tmp_path_factory.mktemp("models")
    return {name: Expected(tiny(folder / name, name)) for name in FAMILIES}


def same(ours: StepStats, theirs: StepStats, tolerance: float) -> None:
    for name in FIGURES:
        found, wanted = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=1e-6, err_msg=name)  # a loss may cancel out
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in theirs.metrics.items():
        np.testing.assert_allclose(ours.metrics[name], value, rtol=tolerance, err_msg=name)
    assert ours.mismatch is not None
    assert theirs.mismatch is not None
    np.testing.assert_allclose(ours.mismatch.p999, theirs.mismatch.p999, rtol=tolerance)


@pytest.mark.parametrize(("name", "ranks", "layout"), CASES)
def test_every_layout_is_one_process(
    megatron: Rig, expected: dict[str, Expected], name: str, ranks: int, layout: dict[str, Any]
) -> None:
    """Folder to ranks to folder bit for bit; log-probs of plain transformers, one sample a pass and packed; gradients,
    figures and weights of the torch backend."""
    wanted = expected[name]
    with megatron.trainer(ranks, wanted.model, layout) as trainer:
        there, back = load_file(wanted.model / "model.safetensors"), dict(trainer.named_weights())
        assert there.keys() == back.keys()
        assert all(torch.equal(tensor, back[key]) for key, tensor in there.items())
        for sample, scores in zip(trainer.score(SCORED, frozenset({"proximal"})), wanted.scores, strict=True):
            at = sample["weight"] > 0
            np.testing.assert_allclose(sample["proximal"][at], scores.numpy()[at], rtol=0, atol=1e-5)
        close(trainer.gradients(batch(), ratio_loss), wanted.gradients, 1e-5)
        for seed, theirs in enumerate(wanted.steps):
            same(trainer.step(batch(seed=seed), ratio_loss), theirs, 1e-5)
        close(dict(trainer.named_weights()), wanted.weights, 1e-4)


def test_transformer_engine_is_refused_where_it_is_not(megatron: Rig, expected: dict[str, Expected]) -> None:
    layout = {"transformer_engine": True, "fp8": "hybrid"}
    with (
        pytest.raises(ConfigError, match="Transformer Engine is not installed"),
        megatron.trainer(1, expected["llama"].model, layout),
    ):
        pass
    with pytest.raises(ValueError, match="set transformer_engine = true"):
        settings(1, {"fp8": "hybrid"})
