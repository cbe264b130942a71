"""Metrics: what is shown and written beside the log, and where else they go."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sluice.config.base import Part, Url


class WandbConfig(Part):
    """Weights & Biases; needs `sluice-rl[wandb]`. A resumed run continues the same W&B run."""

    project: str = Field(min_length=1)
    """Project that the run belongs to."""
    entity: str = ""
    """User or team; empty takes the one of the API key."""
    mode: Literal["offline", "online"] = "offline"
    """`offline` writes to the run folder, for `wandb sync`; `online` sends metrics and the configuration at once."""
    base_url: Url | None = None
    """A server of your own; None is api.wandb.ai."""

    def hosts(self) -> tuple[str, ...]:
        """W&B's own server, when that is where metrics go."""
        return ("api.wandb.ai",) if self.mode == "online" and self.base_url is None else ()

    @model_validator(mode="after")
    def _a_server_is_for_online(self) -> Self:
        if self.base_url is not None and self.mode == "offline":
            raise ValueError("wandb.base_url is read with wandb.mode = 'online'; leave it out, or go online")
        return self


class PrometheusConfig(Part):
    """An endpoint on 127.0.0.1 with the latest value of every metric; needs `sluice-rl[prometheus]`."""

    port: int = Field(default=0, ge=0, lt=65536)
    """Port; 0 takes a free one. The address is told, and kept in the run folder's `prometheus.json`."""


class ObsConfig(Part):
    """What is shown and written beside the log."""

    tensorboard: bool = True
    """Write TensorBoard event files to the run folder."""
    report: bool = True
    """Write `report.html` to the run folder when the run ends, by a failure too."""
    live: bool | None = None
    """Live view; None shows it when the output is a terminal."""
    wandb: WandbConfig | None = None
    """Weights & Biases."""
    prometheus: PrometheusConfig | None = None
    """Prometheus."""
