"""Sluice: RL post-training that runs the same flow on a laptop CPU, one GPU, a node and a cluster.

    import sluice
    config = sluice.load_recipe("recipes/demo.py", ["steps=50"])
    summary = sluice.train(config)

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluice.config.load import load_recipe
    from sluice.config.run import RunConfig
    from sluice.obs.summary import Summary
    from sluice.orchestrate.api import dpo, evaluate, generate, sft, train

__version__ = "0.1.0"
__all__ = ["RunConfig", "__version__", "dpo", "evaluate", "generate", "load_recipe", "sft", "train"]

_HOMES = {
    "RunConfig": "sluice.config.run",
    "load_recipe": "sluice.config.load",
    "dpo": "sluice.orchestrate.api",
    "evaluate": "sluice.orchestrate.api",
    "generate": "sluice.orchestrate.api",
    "sft": "sluice.orchestrate.api",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sluice' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _CallablePackage(ModuleType):
    """`sluice.train` is a package and the function that users call; importing a part of the one must not
    take the other away, whatever is imported first."""

    def __call__(self, config: RunConfig, **options: Any) -> Summary:
        from sluice.orchestrate.api import train as train_run

        return train_run(config, **options)


import_module("sluice.train")
sys.modules["sluice.train"].__class__ = _CallablePackage
