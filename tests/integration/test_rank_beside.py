"""Several ranks asked beside the calls of all: real processes with the torch backend's workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from tests.unit.train_cases import make_samples, ratio_loss, scratch

from sluice.config.train import TrainConfig
from sluice.errors import CheckpointError, RanksLost, TrainError
from sluice.train.packing import make_batch
from sluice.train.ranks.crew import ProcessCrew
from sluice.train.ranks.trainer import RankedTrainer
from sluice.types import Normaliser

pytestmark = pytest.mark.timeout(280)


def thread_state(pid: int, thread: int) -> str:
    """`T` of one that stands still, as proc(5) has it."""
    return Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[tuple[ProcessCrew, RankedTrainer]]:
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    crew = ProcessCrew(2, tmp_path / "ranks", [environment] * 2)
    trainer = RankedTrainer(
        crew, TrainConfig(ranks=2, micro_batch_tokens=64, rank_seconds=120), scratch(tmp_path / "model"),
        total_steps=10, seed=0, devices=["cpu"] * 2, scratch=tmp_path / "scratch", threads=1,
    )  # fmt: skip
    with closing(trainer):
        yield crew, trainer


def test_ranks_are_asked_beside_a_step(crew: tuple[ProcessCrew, RankedTrainer], tmp_path: Path) -> None:
    """Answers in the order asked for, while all train; failures name their rank and end none."""
    ranks, trainer = crew
    batch = make_batch(make_samples((9, 30, 12)), budget=64, normaliser=Normaliser.TOKEN)
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(ranks.beside, "peak_memory", ranks=[1, 0], seconds=60)
        assert not trainer.step(batch, ratio_loss).skipped
        second, first = asked.result(timeout=60)
    assert min(first, second) > 2**20
    assert ranks.call("snapshot", [(True,)] * 2, seconds=60) == [True, False]
    (tmp_path / "written").mkdir()
    with pytest.raises(CheckpointError, match="rank 1 of the trainer: its state could not be written"):
        ranks.beside("write", "state", tmp_path / "written", ranks=[0, 1], seconds=60)
    assert list((tmp_path / "written").iterdir()), "rank 0 has written"
    assert ranks.beside("peak_memory", ranks=[1], seconds=60)
    assert ranks.beside("peak_memory", ranks=[], seconds=60) == []

    os.kill(ranks.pids[1], signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while any(thread_state(ranks.pids[1], each.id) != "T" for each in psutil.Process(ranks.pids[1]).threads()):
        assert time.monotonic() < deadline
    with pytest.raises(TrainError, match="rank 1 of the trainer: did not answer 'peak_memory' within 2 s"):
        ranks.beside("peak_memory", ranks=[0, 1], seconds=2)
    os.kill(ranks.pids[1], signal.SIGCONT)
    assert ranks.beside("peak_memory", ranks=[0], seconds=60)
    with pytest.raises(RanksLost, match="rank 1 of the trainer: lost its connection"):
        ranks.beside("peak_memory", ranks=[1], seconds=60)  # a late answer would be taken for that of another call
    assert not trainer.step(batch, ratio_loss).skipped

    os.kill(ranks.pids[0], signal.SIGKILL)
    with pytest.raises(RanksLost, match="rank 0 of the trainer: was killed by SIGKILL"):
        ranks.beside("peak_memory", ranks=[0], seconds=60)
