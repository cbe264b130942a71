"""Losses of the policy-gradient methods token by token in plain floats, gradients by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from tests.unit.algo_cases import Case, case, clip, clipped_term, geometric_mean, loss_and_gradient, slope

from sluice.algos import make_algorithm
from sluice.config.algos import (
    AlgorithmConfig,
    CISPOConfig,
    DAPOConfig,
    DecoupledConfig,
    DISConfig,
    GRPOConfig,
    GSPOConfig,
    IcePopGRPOConfig,
    ReinforcePPBaselineConfig,
)
from sluice.config.policy_gradient import IcePopConfig, KLConfig, SequenceMaskConfig, TISConfig, VetoConfig

Token = Callable[[Case, int, list[float], list[float]], float]
"""(case, position, log-probs, log-probs without gradient) → the loss of one token."""


def check(config: AlgorithmConfig, token: Token, *, seeds: int = 6, spread: float = 0.6) -> list[Case]:
    """Loss and gradient of `config` against `token` on several cases; returns them."""
    cases = [case(seed, spread) for seed in range(seeds)]
    for c in cases:
        inputs = c.inputs()
        output = make_algorithm(config, max_new_tokens=20).loss(inputs)
        scales = [0.1 + 0.01 * t for t in range(len(c))]
        losses, gradient = loss_and_gradient(output, inputs, scales)
        trained = [t for t in range(len(c)) if c.weight[t]]

        def total(lp: list[float], c: Case = c, scales: list[float] = scales, trained: list[int] = trained) -> float:
            return sum(scales[t] * token(c, t, lp, c.logprob) for t in trained)

        expected = [token(c, t, c.logprob, c.logprob) if c.weight[t] else 0.0 for t in range(len(c))]
        assert losses == pytest.approx(expected)
        assert gradient == pytest.approx(slope(total, c.logprob), abs=1e-8)
        assert all(values.shape == (len(c),) for values in output.metrics.values())
    return cases


# ── surrogates ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [(GRPOConfig(), 0.2, 0.2), (DAPOConfig(), 0.2, 0.28), (ReinforcePPBaselineConfig(clip_low=0.1), 0.1, 0.2)],
)
def test_the_clipped_surrogate(config: AlgorithmConfig, low: float, high: float) -> None:
    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        return -clipped_term(math.exp(lp[t] - c.behaviour[t]), c.advantage[t], low, high)

    check(config, token)


def test_gspo_is_the_papers_sequence_objective() -> None:
    """Eq. 5: the mean over sequences of min(s A, clip(s) A), s the geometric mean over the trained tokens."""
    config = GSPOConfig(clip_low=0.1, clip_high=0.15)
    clipped = 0
    for seed in range(8):
        c = case(seed)
        counts = [len(c.trained(s)) for s in range(3)]

        def objective(lp: list[float], c: Case = c) -> float:
            terms = []
            for s in range(3):
                tokens = c.trained(s)
                ratio = math.exp(sum(lp[t] - c.behaviour[t] for t in tokens) / len(tokens))
                terms.append(clipped_term(ratio, c.advantage[tokens[0]], 0.1, 0.15))
            return -sum(terms) / 3

        inputs = c.inputs()
        output = make_algorithm(config).loss(inputs)
        losses, gradient = loss_and_gradient(output, inputs, [1 / (3 * counts[s]) for s in c.sequence])
        assert sum(loss / (3 * counts[s]) for loss, s in zip(losses, c.sequence, strict=True)) == pytest.approx(
            objective(c.logprob)
        )
        assert gradient == pytest.approx(slope(objective, c.logprob), abs=1e-8)
        clipped += int(output.metrics["clip_fraction"].sum())
    assert clipped, "no case was clipped"


def test_gspo_has_one_ratio_for_all_turns_of_a_segment_and_ignores_what_is_not_trained() -> None:
    c = case(1)
    changed = Case(
        **{**c.__dict__, "behaviour": [b if w else -99.0 for b, w in zip(c.behaviour, c.weight, strict=True)]}
    )
    for one in (c, changed):
        output = make_algorithm(GSPOConfig(clip_low=9, clip_high=9)).loss(one.inputs())
        for s in range(3):
            tokens = c.trained(s)
            ratio = geometric_mean([math.exp(c.logprob[t] - c.behaviour[t]) for t in tokens])
            for t in tokens:
                assert output.per_token[t].item() == pytest.approx(-ratio * c.advantage[t])


def test_cispo_clips_the_weight_and_keeps_every_gradient() -> None:
    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        weight = clip(math.exp(frozen[t] - c.behaviour[t]), 0.9, 1.3)
        return -weight * c.advantage[t] * lp[t]

    for c in check(CISPOConfig(clip_low=0.1, clip_high=0.3), token):
        output = make_algorithm(CISPOConfig(clip_low=0.1, clip_high=0.3)).loss(c.inputs())
        assert output.metrics["clip_fraction"].sum() > 0


def test_cispo_by_default_has_no_lower_bound() -> None:
    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        return -min(math.exp(frozen[t] - c.behaviour[t]), 5.0) * c.advantage[t] * lp[t]

    check(CISPOConfig(), token, spread=1.5)


def test_dis_masks_on_both_sides_whatever_the_advantage() -> None:
    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        ratio = math.exp(frozen[t] - c.behaviour[t])
        return -ratio * c.advantage[t] * lp[t] if 0.7 < ratio < 1.5 else 0.0

    config = DISConfig(clip_high=0.5)
    for c in check(config, token):
        masked = make_algorithm(config).loss(c.inputs()).metrics["dis_masked"]
        for t in range(len(c)):
            assert masked[t].item() == (not 0.7 < math.exp(c.logprob[t] - c.behaviour[t]) < 1.5)


def test_dis_may_differentiate_its_ratio() -> None:
    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        ratio = math.exp(lp[t] - c.behaviour[t])
        return -ratio * c.advantage[t] * lp[t] if 0.7 < ratio < 6 else 0.0

    check(DISConfig(stop_gradient=False), token)


# ── corrections ─────────────────────────────────────────────────────────────────────────────────────────


def rho(c: Case, t: int) -> float:
    return math.exp(c.proximal[t] - c.behaviour[t])


def around_proximal(c: Case, t: int, lp: list[float], low: float = 0.2, high: float = 0.2) -> float:
    return -clipped_term(math.exp(lp[t] - c.proximal[t]), c.advantage[t], low, high)


def test_tis_truncates_the_weight() -> None:
    check(GRPOConfig(tis=TISConfig(cap=1.2)), lambda c, t, lp, _: min(rho(c, t), 1.2) * around_proximal(c, t, lp))


def test_decoupled_ppo_weighs_by_the_ratio_as_it_is_or_up_to_a_cap() -> None:
    check(DecoupledConfig(), lambda c, t, lp, _: rho(c, t) * around_proximal(c, t, lp))
    check(DecoupledConfig(cap=1.1), lambda c, t, lp, _: min(rho(c, t), 1.1) * around_proximal(c, t, lp))


def test_decoupled_ppo_may_mask_above_the_cap_as_areal_does() -> None:
    config = DecoupledConfig(icepop=IcePopConfig(low=0, high=1.5))
    check(config, lambda c, t, lp, _: rho(c, t) * around_proximal(c, t, lp) if rho(c, t) <= 1.5 else 0.0)


@pytest.mark.parametrize("weigh", [True, False])
def test_icepop_masks_outside_its_band(weigh: bool) -> None:
    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        if not 0.8 <= rho(c, t) <= 1.4:
            return 0.0
        return (rho(c, t) if weigh else 1.0) * around_proximal(c, t, lp, 0.2, 0.28)

    config = IcePopGRPOConfig(icepop=IcePopConfig(low=0.8, high=1.4, weigh=weigh))
    for c in check(config, token):
        masked = make_algorithm(config).loss(c.inputs()).metrics["icepop_masked"]
        assert [masked[t].item() for t in range(len(c)) if c.weight[t]] == [
            float(not 0.8 <= rho(c, t) <= 1.4) for t in range(len(c)) if c.weight[t]
        ]


def test_the_sequence_mask_takes_out_segments_and_leaves_the_ratio_at_behaviour() -> None:
    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        mean = geometric_mean([rho(c, u) for u in c.trained(c.sequence[t])])
        if not 0.9 <= mean <= 1.1:
            return 0.0
        return -clipped_term(math.exp(lp[t] - c.behaviour[t]), c.advantage[t], 0.2, 0.2)

    config = GRPOConfig(sequence_mask=SequenceMaskConfig(low=0.9, high=1.1))
    shares = [make_algorithm(config).loss(c.inputs()).metrics["sequence_masked"].mean() for c in check(config, token)]
    assert any(0 < share < 1 for share in shares), "no case masked some segments and kept others"


def test_the_veto_takes_out_a_segment_with_one_extreme_token() -> None:
    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        ratios = [rho(c, u) for u in c.trained(c.sequence[t])]
        if min(ratios) < 0.5 or max(ratios) > 2:
            return 0.0
        return -clipped_term(math.exp(lp[t] - c.behaviour[t]), c.advantage[t], 0.2, 0.2)

    config = GRPOConfig(veto=VetoConfig(low=0.5, high=2))
    shares = [make_algorithm(config).loss(c.inputs()).metrics["vetoed"].mean() for c in check(config, token)]
    assert any(0 < share < 1 for share in shares), "no case vetoed some segments and kept others"


def test_corrections_combine_and_a_masked_token_has_no_loss_at_all() -> None:
    """TIS, IcePop, the sequence mask, the veto and a KL in the loss, on CISPO's surrogate around proximal."""

    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        ratios = [rho(c, u) for u in c.trained(c.sequence[t])]
        kept = 0.5 <= rho(c, t) <= 2 and 0.8 <= geometric_mean(ratios) <= 1.25 and min(ratios) >= 0.3
        if not kept or max(ratios) > 3:
            return 0.0
        weight = clip(math.exp(frozen[t] - c.proximal[t]), 0.0, 5.0)
        d = lp[t] - c.reference[t]
        return -min(rho(c, t), 1.5) * weight * c.advantage[t] * lp[t] + 0.3 * (math.exp(-d) - 1 + d)

    config = CISPOConfig(
        tis=TISConfig(cap=1.5),
        icepop=IcePopConfig(),
        sequence_mask=SequenceMaskConfig(low=0.8, high=1.25),
        veto=VetoConfig(low=0.3, high=3),
        kl=KLConfig(coefficient=0.3),
    )
    cases = check(config, token, seeds=12)
    metrics = [make_algorithm(config).loss(c.inputs()).metrics for c in cases]
    masked = torch.stack([m["masked"] for m in metrics])
    parts = torch.stack([m[name] for m in metrics for name in ("icepop_masked", "sequence_masked", "vetoed")])
    assert 0 < masked.mean() < 1
    assert torch.equal(masked, parts.view(len(cases), 3, -1).amax(1))


# ── the proximal policy ─────────────────────────────────────────────────────────────────────────────────


def test_proximal_may_be_the_update_itself() -> None:
    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        weight = min(math.exp(frozen[t] - c.behaviour[t]), 2.0)
        return -weight * clipped_term(math.exp(lp[t] - frozen[t]), c.advantage[t], 0.2, 0.2)

    check(GRPOConfig(tis=TISConfig(), proximal="current"), token)


def test_proximal_may_be_interpolated_by_the_lag_of_each_token() -> None:
    """arXiv 2512.06547: log π_prox = log μ + (v_prox - v_μ) / (v_θ - v_μ) · (log π - log μ), v_θ = v_prox + 1."""

    def token(c: Case, t: int, lp: list[float], frozen: list[float]) -> float:
        alpha = c.lag[t] / (c.lag[t] + 1)
        proximal = (1 - alpha) * c.behaviour[t] + alpha * frozen[t]
        weight = math.exp(proximal - c.behaviour[t])
        return -weight * clipped_term(math.exp(lp[t] - proximal), c.advantage[t], 0.2, 0.2)

    check(DecoupledConfig(proximal="interpolated"), token)


def test_a_scoring_pass_is_asked_for_only_where_it_is_needed() -> None:
    def needs(config: AlgorithmConfig) -> set[str]:
        return set(make_algorithm(config, max_new_tokens=20).requires)

    assert needs(GSPOConfig()) == needs(DISConfig()) == needs(DAPOConfig()) == set()
    assert needs(IcePopGRPOConfig()) == needs(DecoupledConfig()) == {"proximal"}
    assert needs(GRPOConfig(veto=VetoConfig())) == needs(GRPOConfig(sequence_mask=SequenceMaskConfig())) == {"proximal"}
    assert needs(DecoupledConfig(proximal="current")) == needs(DecoupledConfig(proximal="interpolated")) == set()
    kl = KLConfig(coefficient=0.1, where="reward")
    assert needs(DecoupledConfig(proximal="current", kl=kl)) == {"proximal", "reference"}


# ── extremes ────────────────────────────────────────────────────────────────────────────────────────────

EVERYTHING = [
    GRPOConfig(),
    DAPOConfig(),
    GSPOConfig(),
    CISPOConfig(),
    IcePopGRPOConfig(),
    DecoupledConfig(),
    DecoupledConfig(proximal="interpolated"),
    DISConfig(),
    DISConfig(stop_gradient=False),
    GRPOConfig(tis=TISConfig(), sequence_mask=SequenceMaskConfig(), veto=VetoConfig()),
    GRPOConfig(kl=KLConfig(coefficient=0.1, estimator="k3")),
    GRPOConfig(kl=KLConfig(coefficient=0.1, estimator="k2")),
]


@pytest.mark.parametrize("config", EVERYTHING)
@pytest.mark.parametrize("distance", [95.0, -95.0, 3e4, -3e4])
def test_extreme_ratios_leave_loss_and_gradient_finite_in_float32(config: AlgorithmConfig, distance: float) -> None:
    """95 nats overflow exp in float32; the gradient through a branch that is cut off must not become 0 · inf."""
    c = case(0)
    far = [x - distance * w for x, w in zip(c.behaviour, c.weight, strict=True)]
    near = [x + distance * w for x, w in zip(c.logprob, c.weight, strict=True)]
    for changes in ({"behaviour": far}, {"proximal": far}, {"reference": far}, {"logprob": near}):
        inputs = Case(**{**c.__dict__, **changes}).inputs(torch.float32)
        output = make_algorithm(config, max_new_tokens=20).loss(inputs)
        assert torch.isfinite(output.per_token).all(), changes.keys()
        assert all(torch.isfinite(values).all() for values in output.metrics.values()), changes.keys()
        (gradient,) = torch.autograd.grad(output.per_token.sum(), inputs.logprobs)
        assert torch.isfinite(gradient).all(), changes.keys()


def test_a_segment_without_a_trained_token_is_harmless() -> None:
    c = case(2)
    bare = Case(**{**c.__dict__, "weight": [w if s else 0 for w, s in zip(c.weight, c.sequence, strict=True)]})
    masks = {"sequence_mask": SequenceMaskConfig(low=0.5, high=2), "veto": VetoConfig()}
    for config in (GSPOConfig(), GRPOConfig(**masks)):
        full, less = (make_algorithm(config).loss(one.inputs()).per_token for one in (c, bare))
        later = torch.tensor(c.sequence) > 0
        assert torch.isfinite(less).all()
        assert torch.equal(full[later], less[later])


# ── settings that contradict each other ─────────────────────────────────────────────────────────────────


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValidationError, match="drops the proximal policy"):
        DISConfig(tis=TISConfig())
    with pytest.raises(ValidationError, match=r"set algorithm\.cap"):
        DecoupledConfig(tis=TISConfig())
    with pytest.raises(ValidationError, match="everything would be masked"):
        IcePopConfig(low=2, high=1)
