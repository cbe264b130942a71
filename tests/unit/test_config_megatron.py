"""What `train.backend = "megatron"` allows, and what it refuses by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sluice.cli import run
from sluice.config.train import TrainConfig
from sluice.errors import ConfigError
from sluice.train.backends.installed import check_installed

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.py"


def train(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"backend": "megatron", **changes})


def test_a_layout_is_taken() -> None:
    config = train(ranks=8, megatron={"tp": 2, "pp": 2, "vpp": 2})
    assert config.megatron.replica == 4
    assert config.megatron.divides_sequences
    assert not train().megatron.divides_sequences
    assert not train(ranks=2, megatron={"tp": 2, "sequence_parallel": False}).megatron.divides_sequences


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 6, "megatron": {"tp": 2, "pp": 2}}, r"train.ranks = 6 is no multiple of 4.*tp 2 x cp 1 x pp 2"),
        ({"megatron": {"sequence_parallel": True}}, r"sequence_parallel = true .* tp = 1"),
        ({"megatron": {"vpp": 2}}, r"vpp = 2 .* pp = 1"),
        ({"lora": {}}, r"train.lora is not there with train.backend = 'megatron'"),
        ({"routing_replay": True}, r"train.routing_replay is not there"),
        ({"share_prompts": "always"}, r"train.share_prompts = 'always' is not there"),
        ({"megatron": {"recompute_layers": 2}}, r"recompute_layers .* that is off"),
        ({"megatron": {"recompute": "mlp"}}, r"train.megatron.recompute .* that is off"),
        (
            {"activation_checkpointing": True, "megatron": {"recompute": "mlp", "recompute_layers": 2}},
            r"recompute_layers counts whole layers",
        ),
        ({"megatron": {"gradients": "bfloat16"}}, r"train.megatron.gradients = 'bfloat16' .* float32"),
        ({"megatron": {"offload_optimizer": 1.5}}, r"less than or equal to 1"),
        ({"backend": "torch", "megatron": {"overlap": False}}, r"train.megatron is read with train.backend"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        train(**changes)


def test_one_flag_chooses_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    """The layout is checked against `--train-gpus`, wherever it stands."""
    assert (
        run(["train", str(RECIPE), "train.megatron.tp=2", "--trainer", "megatron", "--train-gpus", "4", "--dry-run"])
        == 0
    )
    shown = capsys.readouterr().out
    assert 'backend = "megatron"' in shown
    assert "ranks = 4" in shown
    assert run(["train", str(RECIPE), "train.megatron.tp=2", "--trainer", "megatron", "--dry-run"]) == 2
    assert "train.ranks = 1 is no multiple of 2" in capsys.readouterr().err
    assert run(["train", str(RECIPE), "--trainer", "megatrom", "--dry-run"]) == 2
    assert "train.backend" in capsys.readouterr().err


def test_the_backend_that_is_installed_is_found() -> None:
    check_installed(train())
    check_installed(TrainConfig())


def test_a_backend_that_is_missing_or_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found, message in (("0.15.3", "0.16.x, and 0.15.3 is installed"), ("0.16.2", "einops is not installed")):
        folder = tmp_path / found / f"megatron_core-{found}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {found}\n")
        monkeypatch.setattr(sys, "path", [str(folder.parent)])
        with pytest.raises(ConfigError, match=message) as refused:
            check_installed(train())
        assert "pip install 'sluice-rl[megatron]'" in refused.value.hint
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="megatron-core is not installed"):
        check_installed(train())
    check_installed(TrainConfig())
