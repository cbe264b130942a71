"""Keep the Hugging Face libraries of this process, and of those it starts, from the network."""

from __future__ import annotations

import os
import sys

VARIABLES = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
)
"""Set to 1: read by huggingface_hub, transformers, datasets and engines when they are imported."""
_READ_AT_IMPORT = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("huggingface_hub.constants", "HF_HUB_DISABLE_TELEMETRY"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
)
"""Where a library that is imported already keeps what it read."""


def go_offline() -> None:
    """From now on a model or data set that is not on this machine is an error, never a download."""
    for name in VARIABLES:
        os.environ[name] = "1"
    for module, name in _READ_AT_IMPORT:
        loaded = sys.modules.get(module)
        if loaded is not None and hasattr(loaded, name):
            setattr(loaded, name, True)
