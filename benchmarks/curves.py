"""Held-out accuracy of several runs of `benchmarks.gpu_sglang train` in one picture, over steps and over seconds.

    python -m benchmarks.curves RESULT.json ... --out PICTURE.png

Seconds are those of batches, evaluations and checkpoints left out: what a run would have taken that measures nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.rig import parser


def main() -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    arguments_of = parser(__doc__)
    arguments_of.add_argument("results", nargs="+", type=Path)
    arguments_of.add_argument("--out", type=Path, required=True)
    arguments = arguments_of.parse_args()
    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for file in arguments.results:
        found = json.loads(file.read_text())
        steps, accuracy = zip(*found["curve"]["held_out"], strict=True)
        by_step.plot(steps, accuracy, "o-", label=found["run"])
        by_time.plot([step / found["batches_per_second"] for step in steps], accuracy, "o-", label=found["run"])
    by_step.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
    by_time.set(xlabel="seconds of batches")
    by_step.legend()
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
