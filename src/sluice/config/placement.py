"""Where a run's parts are: one process and its children, or a Ray cluster."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sluice.config.base import ClusterAddress, Part


class PlacementConfig(Part):
    """The same loop runs either way; nothing but where the parts are changes."""

    runtime: Literal["inline", "ray"] = "inline"
    """`inline`: the run's process, with servers and ranks as its children. `ray`: servers and ranks are actors that a
    Ray cluster places."""
    colocate: bool = False
    """Engines and trainer take turns on the same devices: engines give their memory up while the trainer computes, the
    trainer's state waits in host memory while they generate. False gives each devices of its own."""
    address: ClusterAddress = ""
    """Ray cluster to attach to: `auto`, `host:port` or `ray://host:port`. Empty attaches to the cluster of the Ray job
    the run is in, if it is in one, and else starts a local one that ends with the run."""
    ready_seconds: float = Field(default=300.0, gt=0)
    """How long to wait until the cluster has room for all parts."""
