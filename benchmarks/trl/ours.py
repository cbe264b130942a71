"""Sluice's side, in a process of its own: `python -m benchmarks.trl.ours SETTINGS.json` prints one JSON object."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.trl.settings import SNAPSHOT, Clock, Settings

settings = Settings.read(sys.argv[1])
clock = Clock(settings.started)

from sluice.config.run import RunConfig  # noqa: E402
from sluice.log.reader import LogReader  # noqa: E402
from sluice.log.records import EpisodeRecord  # noqa: E402
from sluice.obs.metrics import read_metrics  # noqa: E402
from sluice.obs.view import NullView  # noqa: E402
from sluice.orchestrate import api  # noqa: E402
from sluice.types import Author  # noqa: E402

REWARDS = Path(__file__).with_name("reward.py")
NAMES = {"checkpoint": SNAPSHOT, "score": "train", "publish": "publish", "rollout": "rollout", "train": "train"}


class TimedView(NullView):
    """Tells the clock which phase begins. What lies between two phases counts for the earlier one.

    The first weights are published, and a first checkpoint written, before the first rollout: that is start-up.
    """

    def __init__(self) -> None:
        self._begun = False

    def phase(self, name: str) -> None:
        self._begun |= name == "rollout"
        if self._begun:
            clock.enter(NAMES[name])

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        clock.update_done()
        clock.sampled_tokens += round(metrics["rollout/response_tokens"] * metrics["rollout/episodes"])
        clock.trained_tokens += round(metrics["train/tokens"])


def recipe() -> dict[str, Any]:
    """The run as a configuration."""
    out = Path(settings.out)
    optimizer = {
        "lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay,
        "clip_grad": settings.clip_grad, "warmup_steps": settings.warmup, "schedule": "linear",
        "final_lr_ratio": settings.final_lr_ratio,
    }  # fmt: skip
    return {
        "name": out.name,
        "runs_dir": out.parent,
        "seed": settings.seed,
        "threads": settings.threads,
        "device": settings.device,
        "model": {"path": settings.model},
        "data": {
            "train": {"type": "jsonl", "path": settings.prompts, "columns": {"prompt": "question", "answer": "answer"}},
            "shuffle": False,
            "eval_prompts": 0,
            "strategy": {"type": "groups", "samples": settings.samples},
        },
        "rewards": [{"type": "python", "path": f"{REWARDS}:sluice_{settings.reward}"}],
        "algorithm": {
            "type": "grpo", "normaliser": "token", "std": "sample", "eps": settings.advantage_eps,
            "clip_low": settings.clip, "clip_high": settings.clip,
        },
        "rollout": rollout(),
        "steps": settings.updates,
        "groups_per_step": settings.groups,
        "train": {"optimizer": optimizer, "dtype": settings.dtype},
        "evaluation": {"every": 0},
        "checkpoint": {"every": settings.snapshot_every, "keep": 1_000},
        "obs": {"tensorboard": False},
    }  # fmt: skip


def rollout() -> dict[str, Any]:
    """Sampling, by the embedded engine or by the SGLang server of the recipe for a GPU host."""
    sampling = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    if settings.engine == "embedded":
        return {"sampling": sampling, "embedded": {"dtype": settings.dtype}}
    from recipes.smollm2 import gpu_host

    return {**gpu_host()["rollout"], "sampling": sampling}


def first_prompts(run: Path) -> list[list[int]]:
    """Token ids of the first update's prompts, in order, as the log has them."""
    found: dict[str, list[int]] = {}
    for entry in LogReader(run / "log").read():
        if isinstance(entry.record, EpisodeRecord):
            episode = entry.record.episode
            if len(found) == settings.groups and episode.group_id not in found:
                break
            turn = next(t for t in episode.segments[0].turns if t.author is not Author.SAMPLED)
            found[episode.group_id] = [int(id) for id in turn.ids]
    return [found[group] for group in sorted(found)]


def main() -> None:
    config = RunConfig.model_validate(recipe())
    with contextlib.redirect_stdout(sys.stderr):
        api.train(config, view=TimedView(), overwrite=True)
    finished = time.time()
    result = clock.result(finished=finished)
    rows = read_metrics(config.folder / "metrics.jsonl")
    for folder in sorted((config.folder / "checkpoints").glob("step-*")):
        number = int(folder.name.removeprefix("step-"))
        if number:
            (folder / "model").rename(config.folder / f"update-{number:04d}")
    result["first_prompts"] = first_prompts(config.folder)
    result["rewards"] = [row["reward/mean"] for row in rows]
    result["mismatch_mean_abs"] = max(row["mismatch/mean_abs"] for row in rows)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
