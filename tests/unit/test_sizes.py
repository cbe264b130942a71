"""One number of devices for training and one for rollout, whatever the recipe calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny

from sluice.config.sizes import sized
from sluice.errors import ConfigError


def sglang(**group: Any) -> dict[str, Any]:
    return {"engine": "sglang", "sglang": {"groups": [group]}}


def test_each_number_is_what_the_recipe_calls_it(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert sized(config, train=None, rollout=None) is config
    assert sized(config, train=3, rollout=None).train.ranks == 3
    assert sized(config, train=None, rollout=2).rollout.embedded.servers == 2
    wide = tiny(tmp_path, rollout=sglang(tp=2, pp=2))
    assert sized(wide, train=None, rollout=8).rollout.sglang.groups[0].engines == 2


def test_colocated_engines_have_what_the_trainer_has(tmp_path: Path) -> None:
    config = tiny(tmp_path, placement={"colocate": True}, rollout=sglang(tp=2))
    both = sized(config, train=4, rollout=None)
    assert (both.train.ranks, both.rollout.sglang.groups[0].engines) == (4, 2)
    assert sized(config, train=4, rollout=2).rollout.sglang.groups[0].engines == 1
    with pytest.raises(ConfigError, match=r"--rollout-gpus 6 with placement\.colocate, where engines sit on the"):
        sized(config, train=4, rollout=6)


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rollout-gpus 3: one engine takes 2"):
        sized(tiny(tmp_path, rollout=sglang(tp=2)), train=None, rollout=3)
    two = {"engine": "sglang", "sglang": {"groups": [{"role": "prefill"}, {"role": "decode"}]}}
    for rollout in (two, sglang(devices=["0"]), {"engine": "http://127.0.0.1:30000"}):
        with pytest.raises(ConfigError, match="counts engines of one kind that the run starts and places"):
            sized(tiny(tmp_path, rollout=rollout), train=None, rollout=4)
