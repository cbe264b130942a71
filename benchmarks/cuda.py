"""The ring on one accelerator: a tiny model trains in several settings, is stopped and resumed.

    python -m benchmarks.cuda [--device cuda] [--out FILE]

Trainer and embedded engine share the device. Prints one JSON object with the log-prob difference between them and the
gradient norm of every step. Run it from the repository's root: the tiny recipe is that of the tests.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tests.tiny import tiny

from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, TIS and KL": {
        "algorithm": {"type": "grpo", "tis": {"cap": 2.0}, "kl": {"coefficient": 0.1, "where": "loss"}}
    },
    "bfloat16": {"train": {"dtype": "bfloat16"}, "rollout": {"embedded": {"dtype": "bfloat16"}}},
    "float32, lag 1": {"data": {"gate": {"max_lag": 1}}},
}


def run(device: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Four steps, then a resume for a fifth."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny(Path(folder), device=device, steps=4, **changes)
        api.train(config, view=NullView())
        api.train(config.model_copy(update={"steps": 5}), resume=True, view=NullView())
        rows = read_metrics(config.folder / "metrics.jsonl")
    names = ("mismatch/mean_abs", "train/grad_norm", "gate/lag_max")
    return {"steps": len(rows)} | {name: [row[name] for row in rows] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device
    result = {
        "command": f"python -m benchmarks.cuda --device {arguments.device}",
        "device": name,
        "versions": {each: version(each) for each in ("torch", "transformers", "numpy")},
        "settings": {setting: run(arguments.device, changes) for setting, changes in SETTINGS.items()},
    }
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
