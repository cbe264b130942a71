"""Metrics to W&B (offline) and to Prometheus."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from sluice.config.obs import ObsConfig, PrometheusConfig, WandbConfig
from sluice.config.offline import refusals
from sluice.errors import ConfigError, LogError
from sluice.obs.prometheus import PrometheusSink
from sluice.obs.sinks import open_sinks
from sluice.obs.wandb import WandbSink


def scraped(url: str) -> dict[tuple[str, str], float]:
    text = httpx.get(url, timeout=5.0).raise_for_status().text
    return {
        (sample.name, sample.labels["metric"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels["run"] == "mine"
    }


def test_prometheus_reads_the_latest_of_every_metric(tmp_path: Path) -> None:
    sink = PrometheusSink(PrometheusConfig(), tmp_path, run="mine")
    url = json.loads((tmp_path / "prometheus.json").read_text())["url"]
    assert scraped(url) == {}
    sink.write(1, {"reward/mean": 0.5, "reward/component/é x": 1.0, "a/b": 1.0, "a_b": 2.0})
    sink.write(2, {"reward/mean": float("nan"), "a/b": 3.0})
    found = scraped(url)
    assert found.pop(("sluice_reward_mean", "reward/mean")) != 0.5
    assert found == {
        ("sluice_reward_component___x", "reward/component/é x"): 1.0,
        ("sluice_a_b", "a/b"): 3.0,
        ("sluice_a_b", "a_b"): 2.0,
        ("sluice_step", "step"): 2.0,
    }
    sink.truncate_after(1)
    assert scraped(url) == {}
    sink.close()
    sink.close()
    assert not (tmp_path / "prometheus.json").exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, timeout=5.0)


def test_a_port_that_is_taken_is_told_and_what_was_opened_is_closed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ObsConfig.model_validate({"tensorboard": False, "prometheus": {"port": port}})
        with pytest.raises(ConfigError, match=f"obs.prometheus.port = {port} cannot be listened on"):
            open_sinks(config, tmp_path, name="mine", settings={}, resume=False, tell=print)


@pytest.mark.parametrize("package", ["wandb", "prometheus_client"])
def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = package.removesuffix("_client")
    config = ObsConfig.model_validate({extra: {"project": "p"} if extra == "wandb" else {}})
    with pytest.raises(ConfigError, match=rf"not installed\n  → pip install 'sluice-rl\[{extra}\]'"):
        open_sinks(config, tmp_path, name="mine", settings={}, resume=False, tell=print)


def test_wandb_offline_and_a_resume_that_continues_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    told: list[str] = []
    config = ObsConfig(tensorboard=False, wandb=WandbConfig(project="p"))
    states: list[dict[str, Any]] = []
    for resume in (False, True):
        sinks, close = open_sinks(config, tmp_path, name="mine", settings={"lr": 1.0}, resume=resume, tell=told.append)
        for sink in sinks:
            if resume:
                sink.truncate_after(1)
            sink.write(2, {"reward/mean": 0.5})
        close()
        close()
        states.append(json.loads((tmp_path / "wandb.json").read_text()))
    assert states[0]["id"] == states[1]["id"]
    assert [state["resumes"] for state in states] == [0, 1]
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{states[0]['id']}/run-{states[0]['id']}.wandb"))
    assert files, "for `wandb sync`"
    assert all(b"reward/mean" in file.read_bytes() for file in files)
    assert told[0] == f"W&B run {states[0]['id']} of project p, offline"
    (tmp_path / "wandb.json").write_text("{")
    with pytest.raises(LogError, match="does not name a W&B run"):
        WandbSink(WandbConfig(project="p"), tmp_path, name="mine", settings={}, resume=True)


def test_wandb_online_is_a_host(tmp_path: Path) -> None:
    assert refusals(WandbConfig(project="p"), []) == []
    assert refusals(ObsConfig(wandb=WandbConfig(project="p", mode="online")), []) == ["wandb reaches api.wandb.ai"]
    own = WandbConfig(project="p", mode="online", base_url="https://w.example")
    assert refusals(ObsConfig(wandb=own), []) == ["wandb.base_url reaches w.example"]
    with pytest.raises(ValidationError, match=r"wandb\.base_url is read with wandb\.mode = 'online'"):
        WandbConfig(project="p", base_url="https://w.example")
