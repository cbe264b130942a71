"""Ranks and what a model may ask for: an attention of its own, recorded experts; weights that are loaded anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.integration.test_ranks import batch, close, config, one, ranks
from tests.unit.family_cases import family
from tests.unit.train_cases import make_samples, ratio_loss, scratch

from sluice.errors import TrainError
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import LossInputs, LossOutput, Normaliser, Routes, TrainSample

torch.set_num_threads(1)
pytestmark = [pytest.mark.timeout(280), pytest.mark.slow]
STREAMS = frozenset({"proximal", "reference"})


def same_scores(several: Any, alone: TorchTrainer, samples: list[TrainSample]) -> None:
    for mine, other in zip(several.score(samples, STREAMS), alone.score(samples, STREAMS), strict=True):
        for name in STREAMS:
            np.testing.assert_allclose(mine[name], other[name], rtol=0, atol=1e-5)


def test_a_model_that_runs_one_sample_a_pass(tmp_path: Path) -> None:
    """A sliding window: ranks with other numbers of samples would wait for each other in the layers."""
    model, settings = scratch(tmp_path / "model", model_type="mistral", sliding_window=8), config()
    alone = one(model, settings)
    with ranks(2, model, tmp_path, settings) as several:
        for lengths in ((5, 17, 9, 30, 12), (40, 3)):
            made = batch(lengths)
            close(several.gradients(made, ratio_loss), alone.gradients(made, ratio_loss), 1e-5)
            same_scores(several, alone, make_samples(lengths))


def test_what_is_loaded_after_a_scoring_pass_is_what_is_used(tmp_path: Path) -> None:
    model, settings = scratch(tmp_path / "model"), config()
    samples = make_samples((9, 20, 31))
    alone = one(model, settings)
    with ranks(2, model, tmp_path, settings) as several:
        several.save_model(tmp_path / "saved")
        several.save_state(tmp_path / "state")
        first = {name: tensor.clone() for name, tensor in several.named_weights()}
        several.step(batch(), ratio_loss)
        several.score(samples, frozenset({"proximal"}))
        several.load_state(tmp_path / "saved", tmp_path / "state")
        close(dict(several.named_weights()), first, 0.0)
        same_scores(several, alone, samples)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_recorded_experts_are_replayed_by_every_rank(tmp_path: Path, name: str) -> None:
    model, settings = family(tmp_path / "model", name), config(routing_replay=True)
    alone = one(model, settings)
    shape = alone.model.config
    rng = np.random.default_rng(2)

    def recorded(sample: TrainSample) -> TrainSample:
        rows = (len(sample) - 1, shape.num_hidden_layers)
        table = np.array([rng.permutation(6)[: shape.num_experts_per_tok] for _ in range(rows[0] * rows[1])], np.int16)
        return replace(sample, routes=(Routes(0, rows[1], shape.num_experts_per_tok, table.reshape(-1)),))

    samples = [recorded(sample) for sample in make_samples((12, 30, 7, 18, 5))]
    made = make_batch(samples, budget=64, normaliser=Normaliser.TOKEN)
    with ranks(2, model, tmp_path, settings) as several:
        close(several.gradients(made, ratio_loss), alone.gradients(made, ratio_loss), 1e-5)
        ours, theirs = several.step(made, ratio_loss), alone.step(made, ratio_loss)
        for figure in ("routing/agreement", "routing/recorded"):
            np.testing.assert_allclose(ours.metrics[figure], theirs.metrics[figure], rtol=1e-6)
        assert ours.metrics["routing/agreement"] < 1


def test_a_teacher_that_runs_one_sample_a_pass_beside_a_policy_that_packs(tmp_path: Path) -> None:
    model = scratch(tmp_path / "model")
    teacher = {"teacher:t": scratch(tmp_path / "teacher", seed=1, model_type="mistral", sliding_window=8)}
    samples, streams = make_samples((9, 20, 31, 4, 6)), frozenset({"proximal", "teacher:t"})
    alone = TorchTrainer(config(), model, total_steps=10, seed=0, frozen=teacher)
    with ranks(2, model, tmp_path, config(), teacher) as several:
        for mine, other in zip(several.score(samples, streams), alone.score(samples, streams), strict=True):
            for name in streams:
                np.testing.assert_allclose(mine[name], other[name], rtol=0, atol=1e-5)
            assert not np.allclose(mine["teacher:t"], mine["proximal"])
        close(several.gradients(batch(), ratio_loss), alone.gradients(batch(), ratio_loss), 1e-5)


def touchy_loss(inputs: LossInputs) -> LossOutput:
    """Raises where the longest sample is: at one rank, while the other goes on into a collective."""
    if int(inputs.sequence.bincount().max()) == 40:
        raise ZeroDivisionError("the forty")
    return ratio_loss(inputs)


def test_one_rank_that_raises_is_named_with_its_log(tmp_path: Path) -> None:
    with ranks(2, scratch(tmp_path / "model"), tmp_path, config()) as several:
        with pytest.raises(TrainError, match=r"rank [01] of the trainer: ZeroDivisionError: the forty") as caught:
            several.step(batch((40, 30, 5)), touchy_loss)
        assert "rank-" in caught.value.hint
        assert "touchy_loss" in "".join(caught.value.__notes__)
