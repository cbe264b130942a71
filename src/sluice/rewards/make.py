"""From a reward's configuration to the verifier that it names."""

from __future__ import annotations

from sluice.config.rewards import (
    CodeReward,
    ExactReward,
    GivenReward,
    HttpReward,
    JudgeGroupReward,
    JudgeReward,
    MathReward,
    NumericReward,
    PythonGroupReward,
    PythonReward,
    RandomReward,
    ReasoningGymReward,
    RegexReward,
    RewardConfig,
)
from sluice.rewards.base import GroupVerifier, Verifier
from sluice.rewards.code import CodeVerifier
from sluice.rewards.exact import ExactVerifier
from sluice.rewards.given import GivenVerifier
from sluice.rewards.http import HttpVerifier
from sluice.rewards.judge import JudgeGroupVerifier, JudgeVerifier
from sluice.rewards.math import MathVerifier
from sluice.rewards.means import Means
from sluice.rewards.numeric import NumericVerifier
from sluice.rewards.python import PythonGroupVerifier, PythonVerifier
from sluice.rewards.random import RandomVerifier
from sluice.rewards.reasoning_gym import ReasoningGymVerifier
from sluice.rewards.regex import RegexVerifier


def make_verifier(config: RewardConfig, means: Means) -> Verifier | GroupVerifier:
    """The verifier that `config` names. Raises RewardError when it is set up wrongly."""
    match config:
        case ReasoningGymReward():
            return ReasoningGymVerifier(config)
        case ExactReward():
            return ExactVerifier(config)
        case NumericReward():
            return NumericVerifier(config)
        case RegexReward():
            return RegexVerifier(config)
        case MathReward():
            return MathVerifier(config, means)
        case CodeReward():
            return CodeVerifier(config, means)
        case PythonReward():
            return PythonVerifier(config)
        case PythonGroupReward():
            return PythonGroupVerifier(config)
        case HttpReward():
            return HttpVerifier(config, means)
        case JudgeReward():
            return JudgeVerifier(config, means)
        case JudgeGroupReward():
            return JudgeGroupVerifier(config, means)
        case RandomReward():
            return RandomVerifier(config)
        case GivenReward():
            return GivenVerifier(config)
