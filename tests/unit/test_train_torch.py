"""The torch trainer: gradients do not depend on the split, and equal an independent implementation."""

from __future__ import annotations

import math
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_cases import make_samples, padded_logprobs, plain_model, ratio_loss, scratch

from sluice.config.train import OptimizerConfig, TrainConfig
from sluice.errors import TrainError
from sluice.train.backends.torch import TorchTrainer
from sluice.train.base import Trainer, measure_mismatch
from sluice.train.packing import loss_scales, make_batch
from sluice.types import LossInputs, LossOutput, Normaliser, TrainSample

torch.set_num_threads(1)
LENGTHS = (12, 30, 7, 7, 25, 32, 2, 18)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = request.param == "qwen3"
    return scratch(tmp_path_factory.mktemp(request.param), model_type=request.param, tie_word_embeddings=tied)


def _trainer(folder: Path, **config: object) -> TorchTrainer:
    given = {"micro_batch_tokens": 64, "logprob_chunk": 16, **config}
    return TorchTrainer(TrainConfig.model_validate(given), folder, total_steps=10, seed=0)


def _close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], relative: float) -> None:
    """Every tensor within `relative` of its own norm."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        error = float((gradient - theirs[name]).norm() / theirs[name].norm())
        assert error <= relative, f"{name}: {error}"


@pytest.mark.parametrize("normaliser", list(Normaliser))
def test_gradients_equal_plain_transformers_for_every_split(folder: Path, normaliser: Normaliser) -> None:
    samples = make_samples(LENGTHS)
    model = plain_model(folder, torch.float32).double()
    scales = loss_scales(samples, normaliser, constant=16)
    logprobs = padded_logprobs(model, samples)
    loss = torch.zeros((), dtype=torch.float64)
    for sample, values, scale in zip(samples, logprobs, scales, strict=True):
        behaviour, advantage = (torch.from_numpy(sample[n]).double() for n in ("behaviour", "advantage"))
        per_token = -advantage * (values - behaviour).exp()
        loss = loss + (per_token * torch.from_numpy(scale)).sum()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    trainer = _trainer(folder)
    trainer.model.double()
    shuffled = [samples[i] for i in np.random.default_rng(1).permutation(len(samples))]
    for order in (samples, shuffled):
        for budget in (32, 64, 1000):
            batch = make_batch(order, budget=budget, normaliser=normaliser, constant=16)
            _close(trainer.gradients(batch, ratio_loss), expected, 1e-5)


def test_no_split_changes_a_reported_figure(folder: Path) -> None:
    samples = make_samples(LENGTHS)
    figures = []
    for budget in (32, 64, 1000):
        stats = _trainer(folder).step(make_batch(samples, budget=budget, normaliser=Normaliser.TOKEN), ratio_loss)
        assert stats.mismatch is not None
        figures.append([stats.loss, stats.grad_norm, stats.entropy, *stats.metrics.values(), *astuple(stats.mismatch)])
        assert stats.num_tokens == sum(LENGTHS)
        assert stats.num_trained_tokens == sum(sample.num_trained_tokens for sample in samples)
    np.testing.assert_allclose(figures[1:], [figures[0]] * 2, rtol=1e-5)


def _without_signal(samples: list[TrainSample]) -> list[TrainSample]:
    return [sample.with_streams(advantage=np.zeros(len(sample))) for sample in samples]


def test_a_flat_loss_costs_no_backward_pass_and_changes_no_gradient(folder: Path) -> None:
    samples = make_samples(LENGTHS)
    mixed = [*samples[:4], *_without_signal(samples[4:])]
    trainer = _trainer(folder)
    passes: list[int] = []
    first = next(trainer.model.parameters())
    handle = first.register_post_accumulate_grad_hook(lambda _: passes.append(1))
    batch = make_batch(mixed, budget=64, normaliser=Normaliser.TOKEN)
    gradients = trainer.gradients(batch, ratio_loss)
    assert (len(batch.micro_batches), len(passes)) == (3, 1)
    handle.remove()
    scale = sum(s.num_trained_tokens for s in samples[:4]) / sum(s.num_trained_tokens for s in samples)
    alone = trainer.gradients(make_batch(samples[:4], budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    _close(gradients, {name: gradient * scale for name, gradient in alone.items()}, 1e-5)


def test_a_step_without_any_signal_has_a_gradient_of_zeros(folder: Path) -> None:
    samples = make_samples(LENGTHS)
    trainer = _trainer(folder)
    trainer.step(make_batch(samples, budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    stats = trainer.step(make_batch(_without_signal(samples), budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    assert (stats.grad_norm, stats.skipped) == (0.0, False)
    assert stats.entropy > 0
    assert trainer.optimizer.steps_done == 2
    moved = [name for name, tensor in trainer.model.named_parameters() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(before)  # the momentum of the first step


def test_activation_checkpointing_changes_nothing(folder: Path) -> None:
    batch = make_batch(make_samples(LENGTHS), budget=64, normaliser=Normaliser.TOKEN)
    plain = _trainer(folder).gradients(batch, ratio_loss)
    trainer = _trainer(folder, activation_checkpointing=True)
    runs = []
    trainer.model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    again = trainer.gradients(batch, ratio_loss)
    assert len(runs) == 2 * len(batch.micro_batches)
    _close(again, plain, 1e-6)


def test_bfloat16_adds_gradients_up_in_float32(folder: Path) -> None:
    samples = make_samples(LENGTHS, temperature=1.0)
    trainer = _trainer(folder, dtype="bfloat16")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    one = trainer.gradients(make_batch(samples, budget=1000, normaliser=Normaliser.TOKEN), ratio_loss)
    assert {gradient.dtype for gradient in one.values()} == {torch.float32}
    stats = trainer.step(make_batch(samples, budget=32, normaliser=Normaliser.TOKEN), ratio_loss)
    assert math.isfinite(stats.grad_norm)
    master = trainer.optimizer.state()["master/model.norm.weight"]
    weights = dict(trainer.named_weights())
    assert torch.equal(weights["model.norm.weight"], master.bfloat16())
    # The update is far below bfloat16's spacing at 1; only a float32 master can hold it.
    assert not torch.equal(master, master.bfloat16().float())


def test_score_fills_streams_and_keeps_order(folder: Path) -> None:
    samples = make_samples(LENGTHS)
    trainer = _trainer(folder)
    plain = padded_logprobs(plain_model(folder, torch.float32), samples)
    before = trainer.score(samples, frozenset({"proximal", "reference"}))
    assert [s.key for s in before] == [s.key for s in samples]
    for sample, values in zip(before, plain, strict=True):
        trained = sample.trained
        np.testing.assert_allclose(sample["proximal"][trained], values.detach().numpy()[trained], atol=1e-6, rtol=1e-6)
        assert not sample["proximal"][~trained].any()
        np.testing.assert_array_equal(sample["proximal"], sample["reference"])
    trainer.step(make_batch(samples, budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    after = trainer.score(samples, frozenset({"proximal", "reference"}))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old["reference"], new["reference"])
        assert not np.array_equal(old["proximal"], new["proximal"])


def test_stale_tokens_are_scored_though_not_trained(folder: Path) -> None:
    (sample,) = make_samples([12])
    masked = sample.with_streams(weight=np.zeros(12))
    (scored,) = _trainer(folder).score([masked], frozenset({"proximal"}))
    assert np.count_nonzero(scored["proximal"]) == sample.num_trained_tokens


def test_temperature_divides_the_logits(folder: Path) -> None:
    for temperature in (0.5, 1.7):
        samples = make_samples([9, 5], temperature=temperature)
        scored = _trainer(folder).score(samples, frozenset({"proximal"}))
        plain = padded_logprobs(plain_model(folder, torch.float32), samples)
        for sample, values in zip(scored, plain, strict=True):
            wanted = values.detach().numpy()[sample.trained]
            np.testing.assert_allclose(sample["proximal"][sample.trained], wanted, atol=2e-6, rtol=1e-6)


def test_mismatch_is_zero_on_policy(folder: Path) -> None:
    trainer = _trainer(folder)
    scored = trainer.score(make_samples(LENGTHS), frozenset({"proximal"}))
    samples = [s.with_streams(behaviour=s["proximal"]) for s in scored]
    stats = trainer.step(make_batch(samples, budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    assert stats.mismatch is not None
    assert stats.mismatch.max_abs < 1e-5
    assert stats.metrics["ratio"] == pytest.approx(1, abs=1e-5)


def test_measure_mismatch() -> None:
    found = measure_mismatch(np.array([-1.0, -2.0]), np.array([-1.5, -2.0]))
    assert found is not None
    assert (found.mean_abs, found.max_abs, found.num_tokens) == (0.25, 0.5, 2)
    assert found.kl == pytest.approx((math.exp(0.5) - 1.5) / 2)
    assert measure_mismatch(np.zeros(0), np.zeros(0)) is None


def test_loss_sees_aligned_streams(folder: Path) -> None:
    seen: list[LossInputs] = []

    def loss(inputs: LossInputs) -> LossOutput:
        seen.append(inputs)
        return LossOutput(-inputs.logprobs, {})

    samples = make_samples([6, 9, 4])
    _trainer(folder).step(make_batch(samples, budget=64, normaliser=Normaliser.TOKEN), loss)
    (inputs,) = seen
    assert inputs.sequence.tolist() == [0] * 6 + [1] * 9 + [2] * 4
    assert inputs.episode.tolist() == [0] * 15 + [1] * 4
    assert inputs.num_sequences == 3
    for name in ("behaviour", "advantage", "weight", "version"):
        wanted = np.concatenate([sample[name] for sample in samples])
        np.testing.assert_allclose(inputs.streams[name].numpy(), wanted, rtol=1e-6)
    assert not inputs.logprobs.detach()[inputs.weight == 0].any()
    assert not inputs.entropy.requires_grad


def _with(sample: TrainSample, stream: str, value: float) -> TrainSample:
    values = sample[stream].copy()
    values[np.flatnonzero(sample.trained)[0]] = value
    return sample.with_streams(**{stream: values})


def test_a_loss_that_is_not_finite_names_its_sample_and_updates_nothing(folder: Path) -> None:
    samples = make_samples(LENGTHS)
    samples[3] = _with(samples[3], "advantage", math.nan)
    trainer = _trainer(folder)
    before = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    with pytest.raises(TrainError, match="not finite in segment 1 of episode e1; nothing was updated"):
        trainer.step(make_batch(samples, budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.named_weights())
    assert trainer.optimizer.steps_done == 0
    good = make_batch(make_samples(LENGTHS), budget=64, normaliser=Normaliser.TOKEN)
    assert math.isfinite(trainer.step(good, ratio_loss).grad_norm)


def test_not_a_number_outside_the_loss_is_harmless(folder: Path) -> None:
    samples = make_samples(LENGTHS)
    values = samples[0]["behaviour"].copy()
    values[~samples[0].trained] = -1e9
    samples[0] = samples[0].with_streams(behaviour=values)
    stats = _trainer(folder).step(make_batch(samples, budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    assert math.isfinite(stats.grad_norm)
    assert math.isfinite(stats.metrics["ratio"])


def test_nothing_trained_is_an_explicit_no_op(folder: Path) -> None:
    trainer = _trainer(folder)
    masked = [s.with_streams(weight=np.zeros(len(s))) for s in make_samples([5, 6])]
    before = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    for samples in (masked, []):
        stats = trainer.step(make_batch(samples, budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
        assert stats.skipped
        assert stats.num_trained_tokens == 0
    assert trainer.optimizer.steps_done == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.named_weights())


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda i: LossOutput(i.logprobs.sum(), {}), r"per_token of shape \(\)"),
        (lambda i: LossOutput(-i.logprobs, {"x": i.weight[:2]}), r"returned x of shape \(2,\)"),
        (lambda i: LossOutput(-i.logprobs.detach(), {}), "does not depend on the log-probs"),
    ],
)
def test_losses_of_the_wrong_form(folder: Path, loss: object, says: str) -> None:
    batch = make_batch(make_samples([5]), budget=64, normaliser=Normaliser.TOKEN)
    with pytest.raises(TrainError, match=says):
        _trainer(folder).step(batch, loss)  # type: ignore[arg-type]


def test_samples_that_cannot_be_scored(folder: Path) -> None:
    trainer = _trainer(folder)
    (sample,) = make_samples([70])
    with pytest.raises(TrainError, match=r"episode e0 has 70 tokens.*\n.*train.micro_batch_tokens"):
        trainer.score([sample], frozenset({"proximal"}))
    (sample,) = make_samples([5])
    with pytest.raises(TrainError, match="first token of segment 0 of episode e0"):
        trainer.score([sample.with_streams(version=np.zeros(5))], frozenset({"proximal"}))
    with pytest.raises(TrainError, match="temperature 0"):
        trainer.score([_with(sample, "temperature", 0.0)], frozenset({"proximal"}))
    with pytest.raises(TrainError, match="cannot fill the stream 'value'"):
        trainer.score([sample], frozenset({"value"}))


def test_named_weights_are_the_checkpoint_once(folder: Path, tmp_path: Path) -> None:
    trainer: Trainer = _trainer(folder)
    names = [name for name, _ in trainer.named_weights()]
    stored = load_file(folder / "model.safetensors")
    assert sorted(names) == sorted(stored)
    for name, tensor in trainer.named_weights():
        assert torch.equal(tensor, stored[name])


def test_weight_decay_spares_norms_and_clipping_bounds_the_step(folder: Path) -> None:
    optimizer = OptimizerConfig(lr=1e-2, weight_decay=0.5, clip_grad=0.0)
    trainer = _trainer(folder, optimizer=optimizer)
    decayed = {group["weight_decay"]: len(group["params"]) for group in trainer.optimizer._adamw.param_groups}
    parameters = list(trainer.model.parameters())
    assert decayed == {0.5: sum(p.ndim > 1 for p in parameters), 0.0: sum(p.ndim == 1 for p in parameters)}
    # Adam's first step is lr · sign(gradient) whatever the scale; the second moment shows the clipping.
    batch = make_batch(make_samples(LENGTHS), budget=64, normaliser=Normaliser.TOKEN)
    clipped = _trainer(folder, optimizer=OptimizerConfig(clip_grad=1e-3))
    norm = clipped.step(batch, ratio_loss).grad_norm
    first = [v for n, v in clipped.optimizer.state().items() if n.startswith("exp_avg/")]
    total = float(torch.cat([v.flatten() for v in first]).norm()) / (1 - 0.9)
    assert norm > 1e-2
    assert total == pytest.approx(1e-3, rel=1e-3)
