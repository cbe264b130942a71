"""One recipe under every placement: engines and trainer by turns or with devices of their own, at lag 0 and 2.

    python -m benchmarks.placements [KEY=VALUE ...] [--runtime ray|inline] [--lags 0 2] [--ranks 2] [--servers 2]
                                    [--seed 0] [--out FILE]

Runs of the demo (`recipes/demo.py`, its warm start included), one after the other, each in a process of its own: on a
local Ray cluster or without one, with so many trainer ranks and servers of the embedded engine. Told are held-out
accuracy before and after, lags, what was masked, seconds, and whether the log holds every episode once.
`same_tokens_at_lag_0` compares what the two placements have sampled at lag 0, token by token. Prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rig import command_line, machine, parser, report, say

from sluice.log import ACCOUNTED, EpisodeRecord, Kind, LogReader, account
from sluice.obs.metrics import read_metrics

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.py"
PLACES = {"apart": False, "colocated": True}


def run(folder: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """One run; what its folder says of it."""
    command = [sys.executable, "-c", "from sluice.cli import main; main()", "train", str(RECIPE)]
    command += [f"runs_dir={folder}", f"name={name}", "obs.live=false", "obs.tensorboard=false", "obs.report=false"]
    begin = time.monotonic()
    subprocess.run([*command, *overrides], check=True, stdout=sys.stderr, timeout=1800)
    summary = json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))
    rows = read_metrics(folder / name / "metrics.jsonl")
    fate = account(LogReader(folder / name / "log").read(kinds=ACCOUNTED))
    return {
        "seconds": round(time.monotonic() - begin, 1),
        **{key: summary[key] for key in ("eval_before", "eval_after", "greedy_before", "greedy_after", "steps")},
        "lag_max": max(row["gate/lag_max"] for row in rows),
        "masked_tokens": sum(row["gate/masked_tokens"] for row in rows),
        "mismatch_mean_abs": summary["logprob_mismatch_mean_abs"],
        "time_split": summary["time_split"],
        "nothing_lost_or_twice": fate.complete,
    }


def sampled(folder: Path) -> dict[str, list[list[int]]]:
    """Sampled tokens by episode."""
    found: dict[str, list[list[int]]] = {}
    for entry in LogReader(folder / "log").read(kinds=(Kind.EPISODE,)):
        assert isinstance(entry.record, EpisodeRecord)  # the only kind asked for
        episode = entry.record.episode
        found[episode.id] = [turn.ids.tolist() for turn in episode.sampled_turns()]
    return found


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("set", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")
    arguments_of.add_argument("--runtime", choices=("ray", "inline"), default="ray")
    arguments_of.add_argument("--lags", type=int, nargs="+", default=[0, 2])
    arguments_of.add_argument("--ranks", type=int, default=2)
    arguments_of.add_argument("--servers", type=int, default=2)
    arguments_of.add_argument("--seed", type=int, default=0)
    arguments_of.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = arguments_of.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for lag in arguments.lags:
            for place, shares in PLACES.items():
                name = f"{place}-{lag}"
                say(f"{name}: begins")
                words = [
                    f"seed={arguments.seed}", f"train.ranks={arguments.ranks}", f"data.gate.max_lag={lag}",
                    f"rollout.embedded.servers={arguments.servers}", f"placement.runtime={arguments.runtime}",
                    f"placement.colocate={str(shares).lower()}", *arguments.set,
                ]  # fmt: skip
                rows.append({"placement": place, "max_lag": lag, **run(folder, name, words)})
        same = None
        if 0 in arguments.lags:
            same = sampled(folder / "apart-0") == sampled(folder / "colocated-0")
    shape = {name: getattr(arguments, name) for name in ("runtime", "ranks", "servers", "seed")}
    report({"command": command_line("placements"), **shape, "runs": rows, "same_tokens_at_lag_0": same, **machine()},
           arguments.out)  # fmt: skip


if __name__ == "__main__":
    main()
