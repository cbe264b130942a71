"""Where the metrics of a run go, as its recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sluice.config.obs import ObsConfig
from sluice.obs.metrics import JsonlSink, MetricSink, TensorBoardSink
from sluice.obs.prometheus import PrometheusSink
from sluice.obs.wandb import WandbSink


def open_sinks(
    config: ObsConfig,
    folder: Path,
    *,
    name: str,
    settings: Mapping[str, Any],
    resume: bool,
    tell: Callable[[str], None],
) -> tuple[list[MetricSink], Callable[[], None]]:
    """Every sink of a run, and what closes them all.

    Args:
        folder: of the run.
        name: of the run.
        settings: the resolved configuration, for sinks that show it.
        resume: continue what an interrupted run began.
        tell: told where metrics can be read.

    Raises:
        ConfigError: a sink's package is missing, or it cannot be opened; the others are closed again.
    """
    with ExitStack() as stack:
        sinks: list[MetricSink] = []

        def opened(sink: Any) -> Any:
            stack.callback(sink.close)
            sinks.append(sink)
            return sink

        opened(JsonlSink(folder / "metrics.jsonl"))
        if config.tensorboard:
            opened(TensorBoardSink(folder / "tensorboard"))
        if config.wandb is not None:
            wandb = opened(WandbSink(config.wandb, folder, name=name, settings=settings, resume=resume))
            tell(f"W&B run {wandb.id} of project {config.wandb.project}, {config.wandb.mode}")
        if config.prometheus is not None:
            tell(f"metrics for Prometheus at {opened(PrometheusSink(config.prometheus, folder, run=name)).url}")
        return sinks, stack.pop_all().close
