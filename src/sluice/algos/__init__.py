"""Algorithms, one small file each. A new one: its file, its config class, one line in `make_algorithm`."""

from __future__ import annotations

from sluice.algos.base import Algorithm
from sluice.algos.dr_grpo import DrGRPO
from sluice.algos.grpo import GRPO
from sluice.algos.reinforce_pp import ReinforcePP
from sluice.algos.rloo import RLOO
from sluice.config.algos import (
    AlgorithmConfig,
    DrGRPOConfig,
    GRPOConfig,
    PythonAlgorithm,
    ReinforcePPConfig,
    RLOOConfig,
)
from sluice.plugins import check_protocol, load_object

__all__ = ["Algorithm", "make_algorithm"]


def make_algorithm(config: AlgorithmConfig, *, max_new_tokens: int | None = None) -> Algorithm:
    """The algorithm that `config` names.

    Args:
        config: one of the algorithm configs.
        max_new_tokens: length that Dr. GRPO divides by when its config names none.

    Raises:
        ConfigError: a class of the user's own lacks part of the `Algorithm` protocol.
    """
    match config:
        case GRPOConfig():
            return GRPO(config)
        case DrGRPOConfig():
            return DrGRPO(config, max_new_tokens=max_new_tokens)
        case RLOOConfig():
            return RLOO(config)
        case ReinforcePPConfig():
            return ReinforcePP(config)
        case PythonAlgorithm(path=path, params=params):
            algorithm = load_object(path, expects="an algorithm class")(**params)
            check_protocol(algorithm, Algorithm, path)
            return algorithm
