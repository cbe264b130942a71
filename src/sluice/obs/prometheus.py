"""Metrics for Prometheus: an endpoint on this machine with the latest value of each.

An endpoint and not a text file for node_exporter, because it ends with the run: a file would go on telling the
values of a run that is dead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sluice.config.obs import PrometheusConfig
from sluice.errors import ConfigError
from sluice.obs.atomic import write_atomic

HOST = "127.0.0.1"


class PrometheusSink:
    """Serves `sluice_reward_mean{run="NAME", metric="reward/mean"}`, and so every metric, as gauges.

    Names of metrics have characters that Prometheus does not allow; they become `_`, and the label `metric` keeps
    the name, so that two that become equal stay apart.

    Args:
        folder: of the run; `prometheus.json` there holds the address for as long as it is served.
        run: name of the run, a label of every value.

    Raises:
        ConfigError: prometheus_client is not installed, or the port is taken.
    """

    def __init__(self, config: PrometheusConfig, folder: Path, *, run: str) -> None:
        try:
            client: Any = import_module("prometheus_client")
            self._family: Any = import_module("prometheus_client.core").GaugeMetricFamily
        except ModuleNotFoundError as error:
            raise ConfigError(
                "obs.prometheus needs the package prometheus-client, which is not installed",
                hint="pip install 'sluice-rl[prometheus]'",
            ) from error
        self._run = run
        self._latest: dict[str, float] = {}
        self._kept = folder / "prometheus.json"
        registry = client.CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = client.start_http_server(config.port, addr=HOST, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"obs.prometheus.port = {config.port} cannot be listened on: {error.strerror}",
                hint="choose another port, or 0 for a free one",
            ) from error
        self.url = f"http://{HOST}:{self._server.server_port}/metrics"
        write_atomic(self._kept, json.dumps({"url": self.url}).encode() + b"\n")
        self._closed = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Replace the values. A metric that a step lacks keeps its last one."""
        self._latest = {**self._latest, **metrics, "step": float(step)}

    def truncate_after(self, step: int) -> None:
        """Forget the values: they are of a later step, or none are held yet."""
        if self._latest.get("step", -1.0) > step:
            self._latest = {}

    def collect(self) -> Iterator[Any]:
        """What a scrape reads; called by the server's thread."""
        families: dict[str, Any] = {}
        for metric, value in self._latest.items():
            name = "sluice_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
            if name not in families:
                families[name] = self._family(name, "Latest value of this metric.", labels=("run", "metric"))
            families[name].add_metric((self._run, metric), value)
        yield from families.values()

    def close(self) -> None:
        """Stop serving."""
        if not self._closed:
            self._closed = True
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(timeout=5.0)
            self._kept.unlink(missing_ok=True)
