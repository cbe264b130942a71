"""Algorithms against values worked out independently in float64 numpy, degenerate groups included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sluice.algos import make_algorithm
from sluice.algos.kl import kl_estimate
from sluice.algos.sft import SFT
from sluice.config.algos import (
    DrGRPOConfig,
    GRPOConfig,
    PythonAlgorithm,
    ReinforcePPConfig,
    RLOOConfig,
)
from sluice.config.policy_gradient import KLConfig, TISConfig
from sluice.errors import ConfigError
from sluice.types import (
    Author,
    Episode,
    Group,
    GroupRequest,
    LossInputs,
    Message,
    Outcome,
    Prompt,
    Reward,
    SamplingParams,
    Scored,
    Segment,
    Turn,
    Version,
    VersionSpan,
    expand,
    observed,
)


def group(ordinal: int, rewards: list[float | None], lengths: list[int] | None = None) -> Group:
    """A group with these rewards; None is an infra failure."""
    prompt = Prompt(f"p{ordinal}", "t", (Message("user", "q"),))
    request = GroupRequest(ordinal, prompt, len(rewards), SamplingParams())
    members = []
    for sample, reward in enumerate(rewards):
        n = (lengths or [2 + sample for sample in range(len(rewards))])[sample]
        turn = Turn(
            Author.SAMPLED,
            np.arange(n, dtype=np.int32),
            logprobs=-0.1 * np.arange(1, n + 1, dtype=np.float32),
            spans=(VersionSpan(0, n, Version(0)),),
            sampling=SamplingParams(),
        )
        outcome = Outcome.INFRA_FAILURE if reward is None else Outcome.COMPLETED
        episode = Episode(request.episode_id(sample), request.id, prompt, (Segment((observed([1, 2]), turn)),), outcome)
        score = None if reward is None else Reward({"r": reward}, {"r": 1.0})
        members.append(Scored(episode, score, expand(episode) if score else ()))
    return Group(request, tuple(members))


def values(config, groups: list[Group]) -> list[float]:
    """The advantage of each valid member (the same at all its sampled tokens)."""
    advantages = make_algorithm(config, max_new_tokens=16).credit(groups)
    found = []
    for one in groups:
        for member in one.valid:
            (sample,) = member.samples
            tokens = advantages[sample.key]
            assert not tokens[~sample.trained].any(), "advantage outside the sampled tokens"
            assert np.all(tokens[sample.trained] == tokens[sample.trained][0])
            found.append(float(tokens[sample.trained][0]))
    return found


REWARDS = [1.0, 0.0, 0.25, 0.5]


def test_grpo() -> None:
    r = np.array(REWARDS)
    assert values(GRPOConfig(eps=1e-6), [group(0, REWARDS)]) == pytest.approx((r - r.mean()) / (r.std() + 1e-6))
    expected = (r - r.mean()) / r.std(ddof=1)
    assert values(GRPOConfig(eps=0, std="sample"), [group(0, REWARDS)]) == pytest.approx(expected)


def test_dr_grpo_divides_by_nothing_and_counts_a_constant_length() -> None:
    r = np.array(REWARDS)
    assert values(DrGRPOConfig(), [group(0, REWARDS)]) == pytest.approx(r - r.mean())
    assert make_algorithm(DrGRPOConfig(), max_new_tokens=16).constant == 16
    assert make_algorithm(DrGRPOConfig(constant=7), max_new_tokens=16).constant == 7
    with pytest.raises(ConfigError, match="constant length"):
        make_algorithm(DrGRPOConfig())


def test_rloo_leaves_each_one_out() -> None:
    expected = [REWARDS[i] - np.mean([r for j, r in enumerate(REWARDS) if j != i]) for i in range(4)]
    assert values(RLOOConfig(), [group(0, REWARDS)]) == pytest.approx(expected)


def test_reinforce_pp_normalises_over_the_tokens_of_the_batch() -> None:
    lengths = [2, 5, 3]
    groups = [group(0, [1.0, 0.0], lengths[:2]), group(1, [3.0], lengths[2:])]
    tokens = np.repeat([1.0, 0.0, 3.0], lengths)
    expected = (np.array([1.0, 0.0, 3.0]) - tokens.mean()) / tokens.std()
    assert values(ReinforcePPConfig(eps=0), groups) == pytest.approx(expected)


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(eps=0),
        GRPOConfig(eps=0, std="sample"),
        DrGRPOConfig(),
        RLOOConfig(),
        ReinforcePPConfig(eps=0),
    ],
)
@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [0.7], [None, 0.3], [None, None]])
def test_degenerate_groups_teach_nothing_and_never_divide_by_zero(config, rewards: list[float | None]) -> None:
    found = values(config, [group(0, rewards)])
    assert found == [0.0] * sum(reward is not None for reward in rewards)


def test_an_infra_failure_is_in_no_statistic() -> None:
    assert values(GRPOConfig(eps=0), [group(0, [1.0, None, 0.0])]) == [1.0, -1.0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_is_subtracted_before_the_group_is_compared(estimator: str) -> None:
    one = group(0, [1.0, 0.0], [2, 3])
    rng = np.random.default_rng(0)
    members = []
    returns = []
    for member in one.members:
        (sample,) = member.samples
        proximal, reference = rng.normal(size=(2, len(sample)))
        members.append(
            Scored(member.episode, member.reward, (sample.with_streams(proximal=proximal, reference=reference),))
        )
        d = np.float32(proximal).astype(float) - np.float32(reference).astype(float)
        kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[estimator]
        returns.append(member.reward.total - 0.1 * kl[sample.trained].sum())
    config = DrGRPOConfig(kl=KLConfig(coefficient=0.1, where="reward", estimator=estimator))
    assert make_algorithm(config, max_new_tokens=4).requires == {"proximal", "reference"}
    found = values(config, [Group(one.request, tuple(members))])
    assert found == pytest.approx(np.array(returns) - np.mean(returns), abs=1e-12)


def inputs(rng: np.random.Generator, n: int, **extra: np.ndarray) -> LossInputs:
    streams = {"behaviour": rng.normal(size=n), "advantage": rng.normal(size=n), **extra}
    return LossInputs(
        logprobs=torch.tensor(rng.normal(size=n), dtype=torch.float64, requires_grad=True),
        entropy=torch.zeros(n, dtype=torch.float64),
        streams={name: torch.tensor(v, dtype=torch.float64) for name, v in streams.items()},
        weight=torch.ones(n, dtype=torch.float64),
        sequence=torch.zeros(n, dtype=torch.long),
        episode=torch.zeros(n, dtype=torch.long),
        num_sequences=1,
    )


def test_clipped_loss_and_its_gradient_against_numpy() -> None:
    x = inputs(np.random.default_rng(1), 200)
    output = make_algorithm(GRPOConfig(clip_low=0.2, clip_high=0.28)).loss(x)
    lp, mu, a = x.logprobs.detach().numpy(), x.streams["behaviour"].numpy(), x.streams["advantage"].numpy()
    r = np.exp(lp - mu)
    cut = np.clip(r, 0.8, 1.28)
    assert output.per_token.detach().numpy() == pytest.approx(-np.minimum(r * a, cut * a))
    output.per_token.sum().backward()
    active = r * a <= cut * a
    assert x.logprobs.grad.numpy() == pytest.approx(np.where(active, -r * a, 0.0))
    assert output.metrics["clip_fraction"].numpy() == pytest.approx((~active).astype(float))


def test_tis_takes_the_ratio_to_proximal_and_weighs_by_the_engine_difference() -> None:
    rng = np.random.default_rng(2)
    x = inputs(rng, 50, proximal=rng.normal(size=50))
    algorithm = make_algorithm(GRPOConfig(tis=TISConfig(cap=2.0), clip_low=0.2, clip_high=0.2))
    assert algorithm.requires == {"proximal"}
    output = algorithm.loss(x)
    lp, a = x.logprobs.detach().numpy(), x.streams["advantage"].numpy()
    mu, prox = x.streams["behaviour"].numpy(), x.streams["proximal"].numpy()
    r = np.exp(lp - prox)
    weight = np.minimum(np.exp(prox - mu), 2.0)
    expected = -np.minimum(r * a, np.clip(r, 0.8, 1.2) * a) * weight
    assert output.per_token.detach().numpy() == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss_carries_a_gradient(estimator: str) -> None:
    rng = np.random.default_rng(3)
    x = inputs(rng, 20, reference=rng.normal(size=20))
    x.streams["advantage"].zero_()
    algorithm = make_algorithm(RLOOConfig(kl=KLConfig(coefficient=0.3, estimator=estimator)))
    assert algorithm.requires == {"reference"}
    output = algorithm.loss(x)
    output.per_token.sum().backward()
    d = x.logprobs.detach().numpy() - x.streams["reference"].numpy()
    kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[estimator]
    slope = {"k1": np.ones_like(d), "k2": d, "k3": 1 - np.exp(-d)}[estimator]
    assert output.per_token.detach().numpy() == pytest.approx(0.3 * kl)
    assert x.logprobs.grad.numpy() == pytest.approx(0.3 * slope)


def test_kl_estimators_agree_on_average_for_samples_of_the_policy() -> None:
    rng = np.random.default_rng(4)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    draws = rng.choice(3, size=200_000, p=p)
    exact = float((p * np.log(p / q)).sum())
    for estimator in ("k1", "k3"):
        assert kl_estimate(estimator, np.log(p)[draws], np.log(q)[draws]).mean() == pytest.approx(exact, abs=2e-3)


def test_sft_is_cross_entropy() -> None:
    x = inputs(np.random.default_rng(5), 10)
    assert torch.equal(SFT().loss(x).per_token, -x.logprobs)


def test_an_algorithm_of_the_users_own_is_checked_at_start(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Half:\n    requires = frozenset()\n    def credit(self, groups): return {}\n")
    with pytest.raises(ConfigError, match="makes a Half, which has no"):
        make_algorithm(PythonAlgorithm(path=f"{file}:Half"))
