"""The critic: values and gradients equal plain transformers for any split; saved and loaded it goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from train_cases import make_samples, plain_model, scratch

from sluice.algos.ppo import PPO
from sluice.config.critic import CriticConfig, PPOConfig
from sluice.config.train import TrainConfig
from sluice.errors import CheckpointError, TrainError
from sluice.train.backends.critic import TorchCritic
from sluice.train.base import Critic
from sluice.train.packing import loss_scales, make_batch
from sluice.types import Normaliser, TrainSample, ValueInputs

torch.set_num_threads(1)
LENGTHS = (12, 30, 7, 7, 25, 32, 2, 18)
CONFIG = CriticConfig.model_validate({"optimizer": {"lr": 1e-2, "schedule": "cosine"}})
LOSS = PPO(PPOConfig()).value_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scratch(tmp_path_factory.mktemp("critic"))


def _critic(folder: Path, dtype: str = "float32", **train: object) -> TorchCritic:
    given = TrainConfig.model_validate({"micro_batch_tokens": 64, "dtype": dtype, **train})
    return TorchCritic(CONFIG, given, folder, total_steps=6)


def _samples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[TrainSample]:
    rng = np.random.default_rng(seed + 100)
    return [
        sample.with_streams(value=rng.normal(size=len(sample)), **{"return": rng.normal(size=len(sample))})
        for sample in make_samples(lengths, seed=seed)
    ]


def _steps(critic: TorchCritic, first: int, last: int) -> list[float]:
    results = []
    for number in range(first, last):
        batch = make_batch(_samples((12, 30, 7), seed=number), budget=64, normaliser=Normaliser.TOKEN)
        stats = critic.step(batch, LOSS)
        results += [stats.loss, stats.grad_norm, stats.lr, stats.metrics["clip_fraction"]]
    return results


def _head(critic: TorchCritic) -> None:
    """A head that is not zero, so that gradients reach the layers."""
    with torch.no_grad():
        critic.model.head.weight.copy_(torch.linspace(-1, 1, 32)[None])
        critic.model.head.bias.fill_(0.3)


def test_values_begin_at_zero_and_are_read_before_their_token(folder: Path) -> None:
    critic: Critic = _critic(folder)
    samples = _samples()
    assert not any(sample["value"].any() for sample in critic.score(samples))
    critic = _critic(folder)
    _head(critic)
    model = plain_model(folder, torch.float32)
    for sample, scored in zip(samples, critic.score(samples), strict=True):
        with torch.no_grad():
            hidden = model.model(torch.from_numpy(sample.ids.astype(np.int64))[None]).last_hidden_state[0]
            before = (hidden @ torch.linspace(-1, 1, 32) + 0.3)[:-1].numpy()
        expected = np.where(sample.trained, np.concatenate([[0], before]), 0)
        np.testing.assert_allclose(scored["value"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normaliser", [Normaliser.TOKEN, Normaliser.SEQUENCE])
def test_gradients_equal_plain_transformers_for_every_split(folder: Path, normaliser: Normaliser) -> None:
    samples = _samples()
    model = plain_model(folder, torch.float32).double()
    head = torch.linspace(-1, 1, 32).double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for sample, scale in zip(samples, loss_scales(samples, normaliser), strict=True):
        hidden = model.model(torch.from_numpy(sample.ids.astype(np.int64))[None]).last_hidden_state[0]
        values = torch.nn.functional.pad((hidden @ head + 0.3)[:-1], (1, 0))
        old, target = (torch.from_numpy(sample[name]).double() for name in ("value", "return"))
        clipped = old + (values - old).clamp(-0.2, 0.2)
        worse = torch.maximum((values - target) ** 2, (clipped - target) ** 2)
        loss = loss + (0.5 * worse * torch.from_numpy(scale)).sum()
    loss.backward()
    expected = {f"layers.{n}": p.grad for n, p in model.model.named_parameters() if p.grad is not None}
    critic = _critic(folder)
    critic.model.double()
    _head(critic)
    shuffled = [samples[i] for i in np.random.default_rng(1).permutation(len(samples))]
    for order in (samples, shuffled):
        for budget in (32, 64, 1000):
            ours = critic.gradients(make_batch(order, budget=budget, normaliser=normaliser), LOSS)
            assert ours.pop("head.bias").shape == (1,)
            wanted = {**expected, "head.weight": head.grad[None]}  # type: ignore[index]
            assert ours.keys() == wanted.keys()
            for name, gradient in ours.items():
                error = float((gradient - wanted[name]).norm() / wanted[name].norm())  # type: ignore[union-attr]
                assert error <= 1e-5, name


def test_it_learns_what_it_is_told(folder: Path) -> None:
    config = CriticConfig.model_validate({"optimizer": {"lr": 1e-2}, "value_clip": 0.0})
    critic = TorchCritic(config, TrainConfig(micro_batch_tokens=64), folder, total_steps=40)
    loss = PPO(PPOConfig(critic=config)).value_loss
    batch = make_batch(_samples(), budget=64, normaliser=Normaliser.TOKEN)
    losses = [critic.step(batch, loss).loss for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("done", [0, 2])
def test_resumed_equals_uninterrupted(folder: Path, tmp_path: Path, dtype: str, done: int) -> None:
    whole = _critic(folder, dtype)
    _steps(whole, 0, done)
    expected = _steps(whole, done, 5)
    first = _critic(folder, dtype)
    _steps(first, 0, done)
    first.save_state(tmp_path)
    second = _critic(folder, dtype)
    second.load_state(tmp_path)
    assert _steps(second, done, 5) == expected
    for ours, theirs in zip(second.score(_samples()), whole.score(_samples()), strict=True):
        assert ours["value"].tolist() == theirs["value"].tolist()


def test_a_snapshot_written_later_is_the_moment_it_was_taken(folder: Path, tmp_path: Path) -> None:
    critic = _critic(folder, "bfloat16")
    _steps(critic, 0, 2)
    critic.save_state(tmp_path / "at-once")
    taken = critic.snapshot()
    _steps(critic, 2, 4)
    taken(tmp_path / "later")
    for name in ("optimizer.safetensors", "trainer.json"):
        assert (tmp_path / "later" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()


def test_state_of_another_model(folder: Path, tmp_path: Path) -> None:
    _critic(folder).save_state(tmp_path / "state")
    wider = _critic(scratch(tmp_path / "wider", intermediate_size=64))
    with pytest.raises(CheckpointError, match=r"no tensor layers\.layers\.0\.mlp"):
        wider.load_state(tmp_path / "state")
    (tmp_path / "state" / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        _critic(folder).load_state(tmp_path / "state")


def test_a_loss_that_is_not_finite_changes_nothing(folder: Path) -> None:
    critic = _critic(folder)
    before = {name: p.detach().clone() for name, p in critic.model.named_parameters()}
    samples = _samples((12, 9))
    broken = samples[1].with_streams(**{"return": np.full(9, np.inf)})
    with pytest.raises(TrainError, match="segment 1 of episode e0"):
        critic.step(make_batch([samples[0], broken], budget=64, normaliser=Normaliser.TOKEN), LOSS)
    assert all(torch.equal(before[name], p) for name, p in critic.model.named_parameters())
    masked = [sample.with_streams(weight=np.zeros(len(sample))) for sample in samples]
    stats = critic.step(make_batch(masked, budget=64, normaliser=Normaliser.TOKEN), LOSS)
    assert (stats.loss, stats.grad_norm, stats.metrics) == (0.0, 0.0, {})
    assert critic.optimizer.steps_done == 0


def test_activation_checkpointing_changes_nothing(folder: Path) -> None:
    def loss(inputs: ValueInputs):
        return LOSS(inputs)

    batch = make_batch(_samples(), budget=64, normaliser=Normaliser.TOKEN)
    plain, lean = _critic(folder), _critic(folder, activation_checkpointing=True)
    for critic in (plain, lean):
        _head(critic)
    ours, theirs = (critic.gradients(batch, loss) for critic in (lean, plain))
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).norm()) <= 1e-6 * float(theirs[name].norm()), name
