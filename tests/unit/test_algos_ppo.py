"""PPO with a critic and distillation, against loops written out by hand in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import worked
from numpy.typing import NDArray

from sluice.algos import make_algorithm
from sluice.algos.base import ActorCritic
from sluice.algos.gae import gae, length_adaptive
from sluice.config.critic import CriticConfig, PPOConfig
from sluice.config.distillation import OPDConfig
from sluice.config.policy_gradient import KLConfig
from sluice.types import Group, LossInputs, Outcome, Scored, ValueInputs


def _ppo(**config: Any) -> Any:
    return make_algorithm(PPOConfig.model_validate(config))


def _group(*streams: str, seed: int = 0, outcome: Outcome = Outcome.COMPLETED) -> Group:
    """The worked example's group, with the streams filled at random where scoring fills them."""
    rng = np.random.default_rng(seed)
    one = worked.group()
    members = []
    for member in one.members:
        samples = []
        for sample in member.samples:
            given = {name: np.where(sample["version"] >= 0, rng.normal(size=len(sample)), 0) for name in streams}
            samples.append(sample.with_streams(**given))
        episode = member.episode
        if episode.outcome.counts:
            episode = replace(episode, outcome=outcome)
        members.append(Scored(episode, member.reward, tuple(samples)))
    return Group(one.request, tuple(members))


def _of(group: Group, values: Any, member: int) -> NDArray[np.float64]:
    """Values at the sampled tokens of one member, segment after segment; 0 elsewhere is checked."""
    parts = []
    for sample in group.valid[member].samples:
        array = values[sample.key] if isinstance(values, dict) else sample[values].astype(np.float64)
        assert not array[sample["version"] < 0].any()
        parts.append(array[sample["version"] >= 0])
    return np.concatenate(parts)


def _by_definition(rewards: list[float], values: list[float], gamma: float, decay: float) -> list[float]:
    """Σ_k (γλ)^k δ_{t+k}, every sum written out."""
    n = len(values)
    delta = [rewards[t] + (gamma * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * decay) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "decay"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.5, 1.0)])
def test_gae_is_its_definition(gamma: float, decay: float) -> None:
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 9))
    assert gae(rewards, values, gamma=gamma, decay=decay) == pytest.approx(
        _by_definition(rewards.tolist(), values.tolist(), gamma, decay), abs=1e-12
    )
    if (gamma, decay) == (1.0, 1.0):  # reward to go less value
        assert gae(rewards, values, gamma=1, decay=1) == pytest.approx(rewards[::-1].cumsum()[::-1] - values)
    if decay == 0:  # one-step temporal difference
        assert gae(rewards, values, gamma=gamma, decay=0)[-1] == pytest.approx(rewards[-1] - values[-1])
    assert gae(np.zeros(0), np.zeros(0), gamma=gamma, decay=decay).shape == (0,)


def test_length_adaptive_decay() -> None:
    assert length_adaptive(0.05, 1000) == pytest.approx(1 - 1 / 50)
    assert length_adaptive(0.05, 10) == 0.0
    assert length_adaptive(0.05, 0) == 0.0


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.TRUNCATED])
def test_time_runs_over_sampled_tokens_through_turns_and_segments(outcome: Outcome) -> None:
    """Observed tokens are skipped: 4 + 2 tokens of the first segment, then 3 of the second, one reward at the end."""
    group = _group("value", outcome=outcome)
    algorithm = _ppo(gamma=0.9, gae_lambda=0.8, normalise=False)
    values = _of(group, "value", 0)
    assert len(values) == 9
    expected = _by_definition([0.0] * 8 + [1.0], values.tolist(), 0.9, 0.8)
    assert _of(group, algorithm.credit([group]), 0) == pytest.approx(expected, abs=1e-12)
    assert _of(group, algorithm.targets([group]), 0) == pytest.approx(np.array(expected) + values, abs=1e-12)


def test_advantages_are_normalised_over_the_sampled_tokens_of_the_batch() -> None:
    groups = [_group("value", seed=seed) for seed in (0, 1)]
    second = replace(groups[1].request, ordinal=1)
    renamed = []
    for member in groups[1].members:
        samples = tuple(replace(s, episode_id="g000001" + s.episode_id[7:]) for s in member.samples)
        renamed.append(replace(member, samples=samples))
    groups[1] = Group(second, tuple(renamed))
    raw = _ppo(gamma=0.9, normalise=False, eps=0.0).credit(groups)
    ours = _ppo(gamma=0.9, eps=0.0).credit(groups)
    every = np.concatenate([_of(group, raw, member) for group in groups for member in (0, 1)])
    for group in groups:
        for member in (0, 1):
            expected = (_of(group, raw, member) - every.mean()) / every.std()
            assert _of(group, ours, member) == pytest.approx(expected)
    # targets are those of the advantages as they were before
    for group in groups:
        target = _of(group, _ppo(gamma=0.9).targets(groups), 0)
        assert target == pytest.approx(_of(group, raw, 0) + _of(group, "value", 0))


def test_a_decay_by_length_and_another_for_the_targets() -> None:
    group = _group("value")
    algorithm = _ppo(length_adaptive=0.5, value_lambda=1.0, normalise=False)
    values = _of(group, "value", 0)
    rewards = [0.0] * 8 + [1.0]
    expected = _by_definition(rewards, values.tolist(), 1.0, 1 - 1 / (0.5 * 9))
    assert _of(group, algorithm.credit([group]), 0) == pytest.approx(expected)
    assert _of(group, algorithm.targets([group]), 0) == pytest.approx(np.ones(9))  # Monte Carlo


def test_kl_is_taken_off_each_tokens_reward() -> None:
    group = _group("value", "proximal", "reference")
    kl = KLConfig(coefficient=0.1, where="reward", estimator="k1")
    algorithm = _ppo(kl=kl, gamma=0.9, gae_lambda=0.8, normalise=False)
    assert algorithm.requires == {"value", "proximal", "reference"}
    rewards = -0.1 * (_of(group, "proximal", 0) - _of(group, "reference", 0))
    rewards[-1] += 1.0
    expected = _by_definition(rewards.tolist(), _of(group, "value", 0).tolist(), 0.9, 0.8)
    assert _of(group, algorithm.credit([group]), 0) == pytest.approx(expected)


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_value_loss_and_its_gradient(clip: float) -> None:
    rng = np.random.default_rng(3)
    new, old, target = rng.normal(size=(3, 200))
    algorithm = make_algorithm(PPOConfig(critic=CriticConfig(value_clip=clip)))
    assert isinstance(algorithm, ActorCritic)
    values = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(200, dtype=torch.long)
    streams = {"value": torch.tensor(old), "return": torch.tensor(target)}
    output = algorithm.value_loss(ValueInputs(values, streams, torch.ones(200), zeros, zeros, 1))
    output.per_token.sum().backward()
    assert values.grad is not None
    plain, slope = 0.5 * (new - target) ** 2, new - target
    if not clip:
        assert output.metrics == {}
    else:
        moved = old + np.clip(new - old, -clip, clip)
        bound = 0.5 * (moved - target) ** 2
        slope = np.where(bound > plain, 0.0, slope)  # where the clipped loss is larger its value does not move
        assert output.metrics["clip_fraction"].numpy() == pytest.approx((bound > plain).astype(float))
        plain = np.maximum(plain, bound)
        assert 0 < (slope == 0).mean() < 1
    assert output.per_token.detach().numpy() == pytest.approx(plain)
    assert values.grad.numpy() == pytest.approx(slope)


def test_nothing_to_credit() -> None:
    empty = Group(worked.request(), (worked.group().members[2],))
    assert _ppo().credit([empty]) == {}
    assert _ppo().targets([]) == {}
    flat = _group("value")
    zero = {s.key: s.with_streams(value=np.zeros(len(s))) for m in flat.valid for s in m.samples}
    members = [replace(m, samples=tuple(zero[s.key] for s in m.samples)) for m in flat.members[1:]]
    found = _ppo().credit([Group(flat.request, tuple(members))])  # one episode, reward 0, values 0
    assert all(not values.any() for values in found.values())


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_distillation_judges_each_token_by_the_teacher(weight: float) -> None:
    group = _group("proximal", "teacher__big")
    config = OPDConfig(teacher="big", coefficient=0.7, reward_coefficient=weight)
    algorithm = make_algorithm(config)
    assert algorithm.requires == {"proximal", "teacher:big"}
    rewards = [1.0, 0.0]  # of the two valid members; RLOO: each less the other
    for member in (0, 1):
        gap = _of(group, "teacher:big", member) - _of(group, "proximal", member)
        expected = 0.7 * gap + weight * (rewards[member] - rewards[1 - member])
        assert _of(group, algorithm.credit([group]), member) == pytest.approx(expected, abs=1e-12)


def test_distillation_descends_the_reverse_kl() -> None:
    """Over all tokens of one state, each as often as the policy draws it, the gradient is that of the KL."""
    rng = np.random.default_rng(5)
    logits = torch.tensor(rng.normal(size=6), dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(rng.normal(size=6), dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    advantage = 0.7 * (teacher - policy.detach())
    inputs = LossInputs(
        logprobs=policy,
        entropy=torch.zeros(6),
        streams={"advantage": advantage, "behaviour": policy.detach(), "teacher:big": teacher},
        weight=torch.ones(6),
        sequence=torch.zeros(6, dtype=torch.long),
        episode=torch.zeros(6, dtype=torch.long),
        num_sequences=1,
    )
    output = make_algorithm(OPDConfig(teacher="big", coefficient=0.7)).loss(inputs)
    (ours,) = torch.autograd.grad((policy.detach().exp() * output.per_token).sum(), logits, retain_graph=True)
    kl = (policy.exp() * (policy - teacher)).sum()
    (theirs,) = torch.autograd.grad(0.7 * kl, logits)
    torch.testing.assert_close(ours, theirs)
    mean = (policy.detach().exp() * output.metrics["teacher_kl"]).sum()
    assert float(mean) == pytest.approx(float(kl.detach()))
