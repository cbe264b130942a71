"""The ring on one accelerator: a tiny model trains in several settings, is stopped and resumed.

    python -m benchmarks.cuda [--device cuda] [--out FILE]

Trainer and embedded engine share the device. Prints one JSON object with the log-prob difference between them and the
gradient norm of every step. Run it from the repository's root: the tiny recipe is that of the tests.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rig import command_line, machine, parser, report
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
    flags = parser(__doc__)
    flags.add_argument("--device", default="cuda")
    flags.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = flags.parse_args()
    result = {
        "command": command_line("cuda"),
        **machine(),
        "settings": {setting: run(arguments.device, changes) for setting, changes in SETTINGS.items()},
    }
    report(result, arguments.out)


if __name__ == "__main__":
    main()
