"""The SmolLM2 recipes are valid as they stand, on a host of one's own and on one without a registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.config.load import load_recipe
from sluice.config.runners import CommandRunner

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["smollm2", "smollm2_tools"])
def test_both_forms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_SITE", "/site")
    here = load_recipe(f"{RECIPES / name}.py")
    there = load_recipe(f"{RECIPES / name}.py:gpu_host")
    assert here.rollout.engine == there.rollout.engine == "sglang"
    assert here.rollout.sglang.python is None
    assert there.rollout.sglang.python == Path("/site/engine/bin/python")
    assert there.rollout.sglang.groups[0].args["attention-backend"] == "triton"
    assert "attention-backend" not in here.rollout.sglang.groups[0].args
    assert here.train == there.train
    assert here.data == there.data


def test_the_tool_recipe_starts_a_program_that_exists() -> None:
    runner = load_recipe(str(RECIPES / "smollm2_tools.py")).rollout.runner
    assert isinstance(runner, CommandRunner)
    assert Path(runner.command[-1]).name == "calculator_words.py"
    assert Path(runner.command[-1]).is_file()
