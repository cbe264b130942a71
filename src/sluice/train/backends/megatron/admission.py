"""What a rank looks at before it meets the others and before anything is allocated."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from sluice.config.train import TrainConfig
from sluice.errors import ConfigError
from sluice.models.build import read_config
from sluice.train.backends.megatron.families import Architecture, architecture, check_layout
from sluice.train.backends.megatron.folder import Reader
from sluice.train.ranks.spec import RankSpec


def admitted(spec: RankSpec) -> Architecture:
    """The model that the ranks are to train.

    Raises:
        ConfigError: it is of no family here, or cannot be divided so; a frozen policy has another architecture; or a
            library or device is missing.
        TrainError: a tensor is missing, unknown, or of another shape; of a frozen policy too.
    """
    described = architecture(read_config(spec.model_folder))
    chosen = spec.config.megatron
    check_layout(described, tp=chosen.tp, pp=chosen.pp, vpp=chosen.vpp, cp=chosen.cp)
    _check_host(spec.config, spec.device)
    _check_weights(spec.model_folder, described)
    for stream, folder in spec.frozen.items():
        _check_same(stream, folder, described)
        _check_weights(folder, described)
    return described


def _check_host(config: TrainConfig, device: str) -> None:
    chosen = config.megatron
    if chosen.transformer_engine and find_spec("transformer_engine") is None:
        raise ConfigError(
            "train.megatron.transformer_engine = true, and Transformer Engine is not installed where the ranks run",
            hint="install transformer-engine[pytorch] there, or leave transformer_engine and fp8 out",
        )
    if device != "cpu" and config.dtype == "float32" and (chosen.cp > 1 or chosen.attention == "varlen"):
        raise ConfigError(
            "train.megatron.cp and attention = 'varlen' use FlashAttention, which does not compute in float32",
            hint="set train.dtype = 'bfloat16', or leave them out",
        )
    if chosen.offload_optimizer and device == "cpu":
        raise ConfigError(
            f"train.megatron.offload_optimizer = {chosen.offload_optimizer} takes memory off an accelerator, and these "
            "ranks have none",
            hint="leave offload_optimizer out on a CPU",
        )


def _check_weights(folder: Path, described: Architecture) -> None:
    Reader(folder, described).close()


def _check_same(stream: str, folder: Path, described: Architecture) -> None:
    other = architecture(read_config(folder))
    sizes = [each.name for each in dataclasses.fields(described) if each.name not in ("config", "parameters")]
    theirs, ours = ({name: getattr(each, name) for name in sizes} for each in (other, described))
    theirs["rope_parameters"], ours["rope_parameters"] = (
        getattr(each.config, "rope_parameters", None) for each in (other, described)
    )
    for name, value in ours.items():
        if theirs[name] != value:
            raise ConfigError(
                f"the policy of the stream {stream!r} in {folder} has {name} = {theirs[name]}, and the trained model "
                f"has {value}",
                hint="the Megatron backend scores policies of the trained model's own architecture; train.backend = "
                "'torch' scores others",
            )
