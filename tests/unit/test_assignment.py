"""Which accelerators are whose. Which ones there are is given: this host has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny

from sluice import device
from sluice.config.run import RunConfig
from sluice.errors import ConfigError
from sluice.orchestrate.assignment import assign, assign_evaluation, spare


def config(folder: Path, *, ranks: int = 1, colocate: bool = False, **group: Any) -> RunConfig:
    rollout = {"engine": "sglang", "sglang": {"groups": [group]}}
    return tiny(folder, train={"ranks": ranks}, placement={"colocate": colocate}, rollout=rollout)


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.VISIBLE, "0,1,2,3,4,5,6,7")


def placed(run: RunConfig, on: str = "cuda:0") -> list[str]:
    return [each for group in assign(run, on).sglang.groups for each in group.devices]


@pytest.mark.usefixtures("eight")
def test_engines_come_after_the_trainer_or_sit_on_its_devices(tmp_path: Path) -> None:
    assert placed(config(tmp_path, ranks=2, engines=3, tp=2)) == ["2,3", "4,5", "6,7"]
    assert placed(config(tmp_path, ranks=2, engines=2), "cuda:3") == ["5", "6"]
    assert placed(config(tmp_path, ranks=4, colocate=True, engines=2, tp=2)) == ["0,1", "2,3"]
    assert placed(config(tmp_path, engines=1, devices=["5"])) == ["5"], "the recipe's own word"


@pytest.mark.usefixtures("eight")
def test_too_few_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ask for 8 accelerators; of 8 that are visible 6 are left beside it"):
        assign(config(tmp_path, ranks=2, engines=4, tp=2), "cuda:0")
    with pytest.raises(ConfigError, match="ask for 2 accelerators; of 8 that are visible the trainer has 1"):
        assign(config(tmp_path, colocate=True, engines=2), "cuda:0")


def test_one_accelerator_is_everybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.VISIBLE, "4")
    assert placed(config(tmp_path, engines=2)) == []
    assert placed(config(tmp_path, engines=2), "cpu") == []


@pytest.mark.usefixtures("eight")
def test_servers_of_the_evaluation_come_last_and_are_nobodys_spare(tmp_path: Path) -> None:
    rollout = {"engine": "sglang", "sglang": {"groups": [{"engines": 2, "tp": 2}]}}
    run = tiny(tmp_path, train={"ranks": 1}, evaluation={"servers": 1}, rollout=rollout)
    assert placed(run) == ["1,2", "3,4"]
    assert assign_evaluation(run, "cuda:0").sglang.groups[0].devices == ("5,6",)
    assert spare(run, "cuda:0") == []
    assert assign_evaluation(run, "cpu").sglang.groups[0].devices == ()
    turns = tiny(tmp_path, train={"ranks": 4}, evaluation={"servers": 2}, placement={"colocate": True}, rollout=rollout)
    assert assign_evaluation(turns, "cuda:0").sglang.groups[0].devices == ("4,5", "6,7")
    cluster = tiny(tmp_path, evaluation={"servers": 2}, placement={"runtime": "ray"}, rollout=rollout)
    assert assign_evaluation(cluster, "cuda:0").sglang.groups[0].devices == (), "the cluster places them"
    more = tiny(tmp_path, train={"ranks": 2}, evaluation={"servers": 2}, rollout=rollout)
    with pytest.raises(ConfigError, match="asks for 4 accelerators of its own; of 8 that are visible 2 are left"):
        assign_evaluation(more, "cuda:0")
