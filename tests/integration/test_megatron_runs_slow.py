"""Whole runs that Megatron trains through kills, other layouts, and ranks that die."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.integration.megatron_rig import small
from tests.integration.test_background_checkpoints import contents, kept
from tests.integration.test_kill_resume import comparable, finish, kill_when, records, start, trained_tokens
from tests.integration.test_megatron_runs import recipe
from tests.integration.test_ranks_run import ended
from transformers import AutoModelForCausalLM

from sluice.config import RunConfig
from sluice.errors import RanksLost
from sluice.log import ACCOUNTED, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api
from sluice.orchestrate.exporting import export

pytestmark = [pytest.mark.timeout(580), pytest.mark.slow]
STEPS = 8
LEGS: list[dict[str, Any]] = [
    {},
    {"backend": "megatron", "ranks": 2},
    {"backend": "megatron", "ranks": 2, "megatron": {"pp": 2}},
    {"backend": "megatron", "ranks": 2, "megatron": {"tp": 2}},
    {},
]
"""Torch, replicas with ZeRO, a pipeline, tensors, torch: each goes on from the checkpoint of the one before."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("model") / "small")


class Listening(NullView):
    """Keeps what the person who watches is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


def short(folder: Path, model: Path, train: dict[str, Any], **changes: Any) -> RunConfig:
    base: dict[str, Any] = {"steps": STEPS, "train": train, "checkpoint": {"every": 1, "keep": 2}}
    return recipe(folder, model, **{**base, **changes})


def same_run(ours: RunConfig, theirs: RunConfig) -> None:
    """The same episodes, and the same figures but for rounding, which also makes a resumed step another attempt."""
    assert trained_tokens(ours) == trained_tokens(theirs)
    first, second = comparable(ours), comparable(theirs)
    assert len(first) == len(second) == theirs.steps
    for mine, other in zip(first, second, strict=True):
        assert mine.keys() == other.keys()
        for name in other.keys() - {"version/attempt"}:
            least = 1e-5 if name.startswith("mismatch/") else 1e-6
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-5, atol=least, err_msg=name)


def nothing_lost(config: RunConfig) -> None:
    """What was sampled by a step that came out in other bits later on is dropped by its gate, and sampled again."""
    fate = account(LogReader(config.folder / "log").read(kinds=ACCOUNTED))
    assert (fate.decided_twice, fate.unlogged, fate.undecided) == ((), (), ())
    assert [len(fate.trained_at(step)) for step in range(1, config.steps + 1)] == [16] * config.steps


def interrupt(config: RunConfig, cursor: int) -> bool:
    """As `kill_when`, with Ctrl-C: the run ends by itself."""
    process = start(config, resume=True)
    until = time.monotonic() + 240
    while process.is_alive() and records(config.folder / "log") < cursor:
        assert time.monotonic() < until
        time.sleep(0.002)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGINT)
    process.join(240)
    assert process.exitcode == 1, "KeyboardInterrupt"
    return alive


def test_stopped_and_gone_on_in_other_layouts_and_under_the_other_backend(tmp_path: Path, model: Path) -> None:
    """SIGKILL and Ctrl-C by turns: one curve, that of a run that nobody stopped, moments and all."""
    straight = short(tmp_path / "straight", model, {})
    finish(straight)
    total = records(straight.folder / "log")
    for number, train in enumerate(LEGS[:-1]):
        config = short(tmp_path / "broken", model, train)
        cursor = total * (number + 1) // len(LEGS)
        assert interrupt(config, cursor) if number % 2 else kill_when(config, cursor, resume=number > 0)
        ended(config.folder)
    last = short(tmp_path / "broken", model, LEGS[-1])
    finish(last, resume=True)
    same_run(last, straight)
    nothing_lost(last)


def test_checkpoints_that_two_stages_write_while_the_run_trains_on(tmp_path: Path, model: Path) -> None:
    """Each rank its own files; they are those of a run that stands still meanwhile, and transformers loads them."""
    train = {"backend": "megatron", "ranks": 2, "megatron": {"pp": 2}}
    runs = [
        short(tmp_path / str(beside), model, train, steps=4, checkpoint={"every": 1, "keep": 9, "background": beside})
        for beside in (True, False)
    ]
    for config in runs:
        finish(config)
    ours, theirs = (kept(config) for config in runs)
    assert list(ours) == list(theirs) == [0, 1, 2, 3, 4]
    for step, each in ours.items():
        each.verify()
        assert contents(each) == contents(theirs[step]), f"step {step}"
    assert len(list(ours[4].model.glob("*.safetensors"))) == len(list(ours[4].trainer.glob("*.safetensors"))) == 2
    done = export(runs[0].folder, tmp_path / "model")
    loaded, first = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (done.folder, model))
    held = {n: t for file in ours[4].model.glob("*.safetensors") for n, t in load_file(file).items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in held.items())
    assert all(not torch.equal(loaded[name], first[name]) for name in held)


DYING = """
import os, pathlib, signal
import torch.distributed as dist
from sluice.algos.policy import PolicyGradient
from sluice.algos.base import per_episode
from sluice.config.algos import PolicyGradientConfig
from sluice.types import Normaliser

class Dying(PolicyGradient):
    normaliser = Normaliser.TOKEN
    passes = 0

    def __init__(self, mark, times):
        super().__init__(PolicyGradientConfig())
        self.mark, self.times = pathlib.Path(mark), times

    def credit(self, groups):
        return per_episode(groups, [r - r.mean() for r in self.returns(groups)])

    def loss(self, inputs):
        Dying.passes += 1
        if dist.get_rank() == 1 and Dying.passes == 3 and len(self.mark.read_text()) < self.times:
            self.mark.write_text(self.mark.read_text() + ".")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(inputs)
"""


@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2}, {}], ids=["pp", "tp", "dp"])
def test_a_rank_that_dies_in_the_middle_of_a_step(tmp_path: Path, model: Path, layout: dict[str, int]) -> None:
    """The user reads which, and the run goes on from its last checkpoint and its log, if it may."""
    (tmp_path / "dying.py").write_text(DYING)

    def config(times: int) -> RunConfig:
        (tmp_path / f"mark-{times}").touch()
        params = {"mark": str(tmp_path / f"mark-{times}"), "times": times}
        algorithm = {"type": "python", "path": f"{tmp_path / 'dying.py'}:Dying", "params": params, "kl": None}
        train = {"backend": "megatron", "ranks": 2, "megatron": layout}
        changes = {"steps": 4, "checkpoint": {"every": 1}, "limits": {"restarts": 1}, "algorithm": algorithm}
        return short(tmp_path / str(times), model, train, **changes)

    view = Listening()
    once = config(1)
    api.train(once, view=view)
    assert [line for line in view.lines if re.search(r"rank \d of the trainer: was killed by SIGKILL", line)]
    assert [row["step"] for row in read_metrics(once.folder / "metrics.jsonl")] == [1, 2, 3, 4]
    nothing_lost(once)
    if layout == {"pp": 2}:
        with pytest.raises(RanksLost, match="rank 1 of the trainer: was killed by SIGKILL"):
            api.train(config(9), view=view)
    ended(tmp_path)
