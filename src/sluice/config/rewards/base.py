"""What every reward has."""

from __future__ import annotations

from sluice.config.base import Part
from sluice.config.pattern import Pattern


class RewardBase(Part):
    """What every component has."""

    name: str = ""
    """Name of the component in logs and metrics; empty takes the type's name."""
    weight: float = 1.0
    """Factor in the total."""
    tasks: tuple[str, ...] = ()
    """Limit to these tasks; empty means all."""
    pattern: Pattern = ""
    """Regular expression that finds the answer in the response: its last match, first group if it has
    one. Empty takes the whole response, stripped. No match means an empty answer."""
