"""Ceilings of a batch that stop the run rather than let it go wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sluice.config.run import LimitsConfig
from sluice.errors import EngineError, RewardError, TrainError
from sluice.types import Group, Outcome


def check_infrastructure(groups: Sequence[Group], limits: LimitsConfig) -> None:
    """Raise EngineError, or RewardError, when too many episodes of a batch are infra failures."""
    members = [member.episode for group in groups for member in group.members]
    failed = [episode for episode in members if episode.outcome is Outcome.INFRA_FAILURE]
    if members and len(failed) / len(members) > limits.max_infra_failures:
        kind = RewardError if failed[0].info.get("failed_in") == "reward" else EngineError
        raise kind(
            f"{len(failed)} of {len(members)} episodes of this batch are infra failures, the first because: "
            f"{failed[0].reason}",
            hint="mend that and `--resume`; limits.max_infra_failures sets how many are tolerated",
        )


def check_mismatch(metrics: Mapping[str, float], limits: LimitsConfig) -> None:
    """Raise TrainError when engine and trainer, both at the same version, do not compute the same."""
    mismatch = metrics.get("mismatch/mean_abs", 0.0)
    if metrics["gate/lag_max"] == 0 and mismatch > limits.max_mismatch:
        raise TrainError(
            f"engine and trainer disagree by {mismatch:.3g} nats a token on average, although both are at "
            f"the same version; the limit is {limits.max_mismatch:g}",
            hint="the engine may serve other weights, another precision or another temperature than the "
            "trainer assumes; limits.max_mismatch sets the ceiling",
        )
