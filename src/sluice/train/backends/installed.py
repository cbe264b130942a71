"""Whether what a backend needs is installed. Nothing of it is imported to find out."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from sluice.config.train import TrainConfig
from sluice.errors import ConfigError

MEGATRON_CORE = "0.16"
"""The versions that the backend was written against: their interfaces change with every minor one."""


def check_installed(config: TrainConfig) -> None:
    """Refuse a backend that cannot run here.

    Raises:
        ConfigError: a package is missing, or Megatron-Core is of another version.
    """
    if config.backend == "torch":
        return
    hint = "pip install 'sluice-rl[megatron]', or train.backend = 'torch'"
    for package in ("megatron-core", "einops"):
        try:
            found = version(package)
        except PackageNotFoundError as error:
            raise ConfigError(f"train.backend = 'megatron', and {package} is not installed", hint=hint) from error
        if package == "megatron-core" and found.split(".")[:2] != MEGATRON_CORE.split("."):
            raise ConfigError(
                f"train.backend = 'megatron' runs on megatron-core {MEGATRON_CORE}.x, and {found} is installed",
                hint=hint,
            )
