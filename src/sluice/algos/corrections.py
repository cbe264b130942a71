"""Corrections of the difference between the policy that sampled and the one that trains; they combine freely.

All judge ρ = π_prox / μ of a token: μ is the `behaviour` stream, π_prox the policy at the start of the batch. What
one masks has zero loss and zero gradient. The normaliser was counted before, over all tokens of weight 1, so a
masked token makes a step smaller and gives no other token more say.

* TIS weighs by min(ρ, cap); without a cap it is decoupled PPO's weight (arXiv 2505.24298).
* IcePop masks tokens with ρ outside a band and weighs the others by ρ (arXiv 2510.18855, 2602.15763).
* The sequence mask takes a segment out when the geometric mean of its ρ is outside a band.
* The veto takes a segment out when any ρ of it is outside a band.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.algos.ratio import ratio_of, segment_has, segment_mean
from sluice.config.policy_gradient import Band, PolicyGradientConfig
from sluice.types import LossInputs


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """What the corrections say of each token, without gradient.

    Attributes:
        weight: factor of the token's loss, `[tokens]`; 1 where nothing weighs.
        kept: false where the loss is masked, `[tokens]`.
        metrics: per-token tensors `[tokens]`.
    """

    weight: Tensor
    kept: Tensor
    metrics: dict[str, Tensor]


def correct(config: PolicyGradientConfig, proximal: Tensor, inputs: LossInputs) -> Correction:
    """Weight and mask of every token; all masks apply, and ρ weighs once however many parts ask for it.

    Args:
        config: which parts are on.
        proximal: log-probs of the proximal policy, `[tokens]`.
    """
    behaviour = inputs.streams["behaviour"]
    log_rho = (proximal - behaviour).detach()
    rho = ratio_of(log_rho)
    weight, kept = torch.ones_like(rho), torch.ones_like(rho, dtype=torch.bool)
    metrics: dict[str, Tensor] = {}
    if config.weighs:
        weight = tis_weight(proximal, behaviour, config.weight_cap)
        metrics["correction_weight"] = weight
    masks: dict[str, Tensor] = {}
    if config.icepop:
        masks["icepop_masked"] = _outside(rho, config.icepop)
    if config.sequence_mask:
        masks["sequence_masked"] = _outside(ratio_of(segment_mean(log_rho, inputs)), config.sequence_mask)
    if config.veto:
        masks["vetoed"] = segment_has(_outside(rho, config.veto), inputs)
    for name, mask in masks.items():
        kept = kept & ~mask
        metrics[name] = mask.to(rho.dtype)
    if masks:
        metrics["masked"] = (~kept).to(rho.dtype)
    return Correction(weight, kept, metrics)


def tis_weight(proximal: Tensor, behaviour: Tensor, cap: float | None) -> Tensor:
    """min(π_prox / μ, cap) per token, without gradient; without a cap the ratio as it is."""
    rho = ratio_of((proximal - behaviour).detach())
    return rho if cap is None else rho.clamp(max=cap)


def _outside(ratio: Tensor, band: Band) -> Tensor:
    return (ratio < band.low) | (ratio > band.high)
