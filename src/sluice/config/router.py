"""The router: one process in front of several engines (`smg`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sluice.config.base import Part
from sluice.config.sglang import Flag


class RouterConfig(Part):
    """When there is a router, and how it spreads requests."""

    use: Literal["auto", "always", "never"] = "auto"
    """`auto`: when there is more than one engine. Prefill and decode engines always need it."""
    policy: Literal[
        "manual", "consistent_hashing", "cache_aware", "power_of_two", "least_load", "round_robin", "random"
    ] = "manual"
    """`manual` and `consistent_hashing` keep an episode at one engine by its routing key."""
    assignment: Literal["random", "min_load", "min_group"] = "min_load"
    """Where `manual` puts a new key."""
    cache_threshold: float | None = Field(default=None, ge=0, le=1)
    """`cache_aware`: share of the prompt that must match to follow the cache; None leaves the router's default."""
    balance_abs_threshold: int | None = Field(default=None, ge=0)
    """`cache_aware`: difference in running requests from which load goes before cache."""
    balance_rel_threshold: float | None = Field(default=None, ge=1)
    """`cache_aware`: ratio of running requests from which load goes before cache."""
    ceiling: float = Field(default=1.5, ge=1)
    """An episode leaves its engine when that one runs more than this many times the mean of all engines."""
    slack: int = Field(default=8, ge=0)
    """Requests an engine may run above the mean before `ceiling` counts."""
    prefill_policy: str = ""
    """Policy among prefill engines; empty takes `policy`."""
    decode_policy: str = ""
    """Policy among decode engines; empty takes `policy`."""
    python: Path | None = None
    """Interpreter of the environment that holds `smg`; None takes the engines' own."""
    port: int = Field(default=0, ge=0, lt=65536)
    """Port on this host; 0 takes a free one."""
    start_seconds: float = Field(default=60.0, gt=0)
    """Deadline of the router's start-up, and of an engine's registration."""
    args: dict[str, Flag] = Field(default_factory=dict)
    """Any other argument of `smg launch`, without dashes. An unknown one is the router's own error."""
