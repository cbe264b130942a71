"""Algorithms, one small file each. A new one: its file, its config class, one line in `make_algorithm`."""

from __future__ import annotations

from sluice.algos.base import Algorithm
from sluice.algos.cispo import CISPO
from sluice.algos.dis import DIS
from sluice.algos.dr_grpo import DrGRPO
from sluice.algos.grpo import GRPO
from sluice.algos.gspo import GSPO
from sluice.algos.opd import OPD
from sluice.algos.ppo import PPO
from sluice.algos.reinforce_pp import ReinforcePP, ReinforcePPBaseline
from sluice.algos.rloo import RLOO
from sluice.config.algos import (
    AlgorithmConfig,
    CISPOConfig,
    DAPOConfig,
    DecoupledConfig,
    DISConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    IcePopGRPOConfig,
    PythonAlgorithm,
    ReinforcePPBaselineConfig,
    ReinforcePPConfig,
    RLOOConfig,
)
from sluice.config.critic import PPOConfig
from sluice.config.distillation import OPDConfig
from sluice.plugins import check_protocol, load_object

__all__ = ["Algorithm", "make_algorithm"]


def make_algorithm(config: AlgorithmConfig, *, max_new_tokens: int | None = None) -> Algorithm:
    """The algorithm that `config` names.

    Args:
        config: one of the algorithm configs.
        max_new_tokens: limit of a turn: the length of Dr. GRPO and of the overlong punishment, where none is set.

    Raises:
        ConfigError: a length is needed and none is known, or a class of the user's own lacks part of the
            `Algorithm` protocol.
    """
    match config:
        case GRPOConfig() | DAPOConfig() | IcePopGRPOConfig() | DecoupledConfig():
            return GRPO(config, max_new_tokens=max_new_tokens)
        case GSPOConfig():
            return GSPO(config, max_new_tokens=max_new_tokens)
        case CISPOConfig():
            return CISPO(config, max_new_tokens=max_new_tokens)
        case DISConfig():
            return DIS(config, max_new_tokens=max_new_tokens)
        case DrGRPOConfig():
            return DrGRPO(config, max_new_tokens=max_new_tokens)
        case RLOOConfig():
            return RLOO(config, max_new_tokens=max_new_tokens)
        case ReinforcePPConfig():
            return ReinforcePP(config, max_new_tokens=max_new_tokens)
        case ReinforcePPBaselineConfig():
            return ReinforcePPBaseline(config, max_new_tokens=max_new_tokens)
        case OPDConfig():
            return OPD(config, max_new_tokens=max_new_tokens)
        case PPOConfig():
            return PPO(config, max_new_tokens=max_new_tokens)
        case PythonAlgorithm(path=path, params=params):
            algorithm = load_object(path, expects="an algorithm class")(**params)
            check_protocol(algorithm, Algorithm, path)
            return algorithm
