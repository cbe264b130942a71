"""Several ranks under one trainer: real processes, gloo, FSDP2. What they do is what one rank does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from benchmarks.cut import connections, end_connection
from tests.unit.train_cases import make_samples, ratio_loss, scratch

from sluice.config.train import TrainConfig
from sluice.errors import CheckpointError, ConfigError, RanksLost, TrainError
from sluice.plugins import load_object
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.train.ranks.crew import ProcessCrew
from sluice.train.ranks.trainer import RankedTrainer
from sluice.types import LossInputs, LossOutput, Normaliser, TrainBatch

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(280)
LENGTHS = (5, 17, 9, 30, 12, 7, 3, 21, 40, 11, 2, 26)
OPTIMIZER = {"lr": 3e-2, "warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"optimizer": OPTIMIZER, "micro_batch_tokens": 64, "rank_seconds": 120, **changes}
    )


def one(model: Path, settings: TrainConfig) -> TorchTrainer:
    return TorchTrainer(settings, model, total_steps=10, seed=0)


@contextmanager
def ranks(
    size: int, model: Path, folder: Path, settings: TrainConfig, frozen: Mapping[str, Path] | None = None
) -> Iterator[RankedTrainer]:
    crew = ProcessCrew(size, folder / f"ranks-{size}", [{"OMP_NUM_THREADS": "1"}] * size)
    trainer = RankedTrainer(
        crew, settings, model, total_steps=10, seed=0, devices=["cpu"] * size, scratch=folder / "scratch",
        frozen=frozen, threads=1,
    )  # fmt: skip
    with closing(trainer):
        yield trainer
    assert not any(psutil.pid_exists(pid) for pid in crew.pids)
    assert list((folder / "scratch").iterdir()) == []


def batch(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0, budget: int = 64) -> TrainBatch:
    return make_batch(make_samples(lengths, seed=seed), budget=budget, normaliser=Normaliser.TOKEN)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each tensor."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).abs().max() / tensor.double().abs().max()
        assert float(error) <= tolerance, name


def test_two_ranks_have_the_gradient_and_the_weights_of_one(tmp_path: Path) -> None:
    """Gradients, figures, three steps, scores: for batches of many passes, of one sample, and of nothing to train."""
    model, settings = scratch(tmp_path / "model"), config()
    alone = one(model, settings)
    with ranks(2, model, tmp_path, settings) as several:
        close(several.gradients(batch(), ratio_loss), alone.gradients(batch(), ratio_loss), 1e-5)
        for number, lengths in enumerate((LENGTHS, (50, 3), (8,))):
            ours, theirs = (
                several.step(batch(lengths, seed=number), ratio_loss),
                alone.step(batch(lengths, seed=number), ratio_loss),
            )
            for name in ("loss", "grad_norm", "lr", "entropy", "num_tokens", "num_trained_tokens", "skipped"):
                np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5, err_msg=name)
            assert ours.mismatch is not None
            assert theirs.mismatch is not None
            np.testing.assert_allclose(ours.mismatch.p999, theirs.mismatch.p999, rtol=1e-5)
            assert ours.metrics.keys() == theirs.metrics.keys()
            for name, value in theirs.metrics.items():
                np.testing.assert_allclose(ours.metrics[name], value, rtol=1e-5, err_msg=name)
        empty = TrainBatch(())
        assert several.step(empty, ratio_loss) == alone.step(empty, ratio_loss)
        close(dict(several.named_weights()), dict(alone.named_weights()), 1e-5)
        samples = make_samples((9, 60, 2, 33, 64), seed=5)
        for streams in (frozenset({"proximal"}), frozenset({"proximal", "reference"}), frozenset[str]()):
            for mine, other in zip(several.score(samples, streams), alone.score(samples, streams), strict=True):
                assert mine.key == other.key
                for name in streams:
                    np.testing.assert_allclose(mine[name], other[name], rtol=1e-5, atol=1e-5)
        with pytest.raises(TrainError, match="cannot fill the stream 'value'"):
            several.score(samples, frozenset({"value"}))
        with pytest.raises(TrainError, match="65 tokens, more than the 64"):
            several.score(make_samples((65,)), frozenset({"proximal"}))


def double_loss(inputs: LossInputs) -> LossOutput:
    """Infinite for the second sample of a micro-batch that has one."""
    found = ratio_loss(inputs)
    return LossOutput(torch.where(inputs.sequence == 1, found.per_token / 0.0, found.per_token), found.metrics)


def of_the_program(inputs: LossInputs) -> LossOutput:
    """As if this file were run by `python`."""
    return ratio_loss(inputs)


of_the_program.__module__ = "__main__"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [{}, {"tie_word_embeddings": False, "model_type": "llama"}])
def test_four_ranks_for_any_split(tmp_path: Path, architecture: dict[str, Any]) -> None:
    """1 = 2 = 4, with budgets that give one pass or ten, and activations kept or computed again."""
    model = scratch(tmp_path / "model", **architecture)
    expected = one(model, config()).gradients(batch(), ratio_loss)
    for size, changes in ((2, {}), (3, {"micro_batch_tokens": 41}), (4, {}), (4, {"micro_batch_tokens": 400}),
                          (2, {"activation_checkpointing": True})):  # fmt: skip
        with ranks(size, model, tmp_path, config(**changes)) as several:
            found = several.gradients(batch(budget=changes.get("micro_batch_tokens", 64)), ratio_loss)
            close(found, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_two_ranks_goes_on_at_three_and_at_one(tmp_path: Path, dtype: str) -> None:
    """2 → 1 → 3 → 2: the same figures as one rank that never stopped."""
    # bfloat16 gradients are summed in another order, and Adam makes much of small ones
    settings = config(dtype=dtype, optimizer=OPTIMIZER if dtype == "float32" else {"lr": 1e-3})
    model, tolerance = scratch(tmp_path / "model"), 1e-4 if dtype == "float32" else 1e-2
    alone = one(model, settings)
    for number in range(4):
        alone.step(batch(seed=number), ratio_loss)
    saved: Path | None = None
    last: dict[str, torch.Tensor] = {}
    for number, size in enumerate((2, 1, 3, 2)):
        here = tmp_path / f"step-{number}"
        here.mkdir()
        if size == 1:
            trainer: Any = one(model, settings)
            trainer.load_state(saved / "model", saved / "state")  # type: ignore[operator]
            trainer.step(batch(seed=number), ratio_loss)
            trainer.save_model(here / "model")
            trainer.save_state(here / "state")
        else:
            with ranks(size, model, tmp_path, settings) as trainer:
                if saved is not None:
                    trainer.load_state(saved / "model", saved / "state")
                trainer.step(batch(seed=number), ratio_loss)
                trainer.save_model(here / "model")
                trainer.save_state(here / "state")
                last = dict(trainer.named_weights())
        saved = here
    assert saved is not None
    restored = one(model, settings)
    restored.load_state(saved / "model", saved / "state")
    assert restored.optimizer.steps_done == 4
    close({n: t.clone() for n, t in restored.named_weights()}, last, 0.0)
    close(last, dict(alone.named_weights()), tolerance)


@pytest.mark.slow
def test_a_snapshot_is_written_while_the_ranks_train(tmp_path: Path) -> None:
    """The first rank's disk stands still (a pipe that nobody reads) during a step; what is written is from before."""
    model, settings = scratch(tmp_path / "model"), config(dtype="bfloat16")
    at_once, later = tmp_path / "at-once", tmp_path / "later"
    for folder in (at_once, later):
        (folder / "model").mkdir(parents=True)
    pipe = later / "model" / "config.json"
    os.mkfifo(pipe)
    with ranks(2, model, tmp_path, settings) as several, ThreadPoolExecutor(1) as beside:
        several.step(batch(seed=0), ratio_loss)
        several.save_model(at_once / "model")
        several.save_state(at_once / "state")
        taken = several.snapshot()
        writing = beside.submit(taken.model, later / "model")
        several.step(batch(seed=1), ratio_loss)
        several.save_state(tmp_path / "after")
        assert not writing.done()
        assert pipe.read_bytes() == (at_once / "model" / "config.json").read_bytes()
        writing.result(timeout=60)
        taken.state(later / "state")
        pipe.unlink()
        written = {str(file.relative_to(later)): file.read_bytes() for file in later.rglob("*") if file.is_file()}
        expected = {str(f.relative_to(at_once)): f.read_bytes() for f in at_once.rglob("*") if f.is_file()}
        del expected["model/config.json"]
        assert written == expected
        state = "state/optimizer.safetensors"
        assert written[state] != (tmp_path / "after" / "optimizer.safetensors").read_bytes()

        taken = several.snapshot()
        nowhere = tmp_path / "not-a-folder"
        nowhere.write_text("")
        with pytest.raises(CheckpointError, match=r"its state could not be written to .*not-a-folder"):
            taken.state(nowhere)
        several.step(batch(seed=2), ratio_loss)  # the ranks live on

        taken = several.snapshot()
        os.mkfifo(pipe)
        writing = beside.submit(taken.model, later / "model")
        os.kill(several._crew.pids[0], signal.SIGKILL)  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(RanksLost, match="rank 0 of the trainer: was killed by SIGKILL"):
            writing.result(timeout=60)


@pytest.mark.slow
def test_what_goes_wrong_at_a_rank_is_what_is_told(tmp_path: Path) -> None:
    """A loss that is not finite updates nothing; one that raises, and a rank that is killed, end all and are named."""
    model, settings = scratch(tmp_path / "model"), config()
    with ranks(2, model, tmp_path, settings) as several:
        before = {name: tensor.clone() for name, tensor in several.named_weights()}
        with pytest.raises(TrainError, match="the loss is not finite in segment"):
            several.step(batch(), double_loss)
        close(dict(several.named_weights()), before, 0.0)
        several.step(batch(), ratio_loss)
        with pytest.raises(CheckpointError, match="cannot be read"):
            several.load_state(tmp_path / "none", tmp_path / "none")
        with pytest.raises(TrainError, match="the ranks were ended"):
            several.step(batch(), ratio_loss)
    with ranks(2, model, tmp_path, settings) as several:
        with pytest.raises(TrainError, match="cannot be sent to the ranks"):
            several.step(batch(), lambda inputs: ratio_loss(inputs))
        with pytest.raises(TrainError, match="'of_the_program' is defined in the program that was started"):
            several.step(batch(), of_the_program)
        assert not several.step(batch(), ratio_loss).skipped  # nothing was sent
    with ranks(3, model, tmp_path, settings) as several:
        os.kill(several._crew.pids[1], signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(TrainError, match="rank 1 of the trainer: was killed by SIGKILL"):
            several.step(batch(), ratio_loss)
    with ranks(2, model, tmp_path, settings) as several:
        several.replicas._config = config(rank_seconds=3)
        os.kill(several._crew.pids[1], signal.SIGSTOP)  # type: ignore[attr-defined]
        began = time.monotonic()
        with pytest.raises(TrainError, match=r"within 3 s|imed out"):
            several.step(batch(), ratio_loss)
        assert time.monotonic() - began < 60
    with pytest.raises(ConfigError, match=r"rank [01]"), ranks(2, tmp_path / "none", tmp_path, settings):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("reset", [False, True])
def test_ranks_whose_mesh_is_cut_are_lost_and_may_be_started_again(tmp_path: Path, reset: bool) -> None:
    with ranks(2, scratch(tmp_path / "model"), tmp_path, config()) as several:
        several.step(batch(), ratio_loss)
        pid = several._crew.pids[1]  # type: ignore[attr-defined]
        assert [end_connection(pid, each, reset=reset) for each in connections(pid)] == [True]
        with pytest.raises(RanksLost, match=r"rank [01] of the trainer: lost touch with another one"):
            several.step(batch(), ratio_loss)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_a_rank_whose_connection_to_the_controller_is_cut_is_lost(tmp_path: Path, frozen: bool) -> None:
    """A rank notices and ends; one that cannot is ended."""
    how = "lost its connection to the controller" if frozen else "ended with exit code 1"
    with ranks(2, scratch(tmp_path / "model"), tmp_path, config()) as several:
        rank = psutil.Process(several._crew.pids[1])  # type: ignore[attr-defined]
        number, deadline = int(rank.cmdline()[-2]), time.monotonic() + 30  # the last one is for calls beside these
        if frozen:
            rank.suspend()
            while rank.status() != psutil.STATUS_STOPPED:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert end_connection(rank.pid, number)
        with pytest.raises(RanksLost, match=f"rank 1 of the trainer: {how}"):
            several.step(batch(), ratio_loss)


OWN = """
from sluice.types import LossOutput

class Own:
    def __init__(self, sign):
        self.sign = sign

    def loss(self, inputs):
        return LossOutput(self.sign * inputs.logprobs, {})
"""


@pytest.mark.slow
def test_a_loss_of_the_users_own_file(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    own = load_object(f"{tmp_path / 'own.py'}:Own", expects="a class")(-1.0)
    model, settings = scratch(tmp_path / "model"), config()
    with ranks(2, model, tmp_path, settings) as several:
        close(several.gradients(batch(), own.loss), one(model, settings).gradients(batch(), own.loss), 1e-5)


CONTROLLER = """
import sys, time
from pathlib import Path
from tests.integration.test_ranks import ProcessCrew, RankedTrainer, config
crew = ProcessCrew(2, Path(sys.argv[1]), [{"OMP_NUM_THREADS": "1"}] * 2)
trainer = RankedTrainer(crew, config(), Path(sys.argv[2]), total_steps=1, seed=0, devices=["cpu"] * 2,
                        scratch=Path(sys.argv[1]) / "scratch", threads=1)
print(*crew.pids, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_ranks_end_with_a_controller_that_is_killed(tmp_path: Path) -> None:
    model = scratch(tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(tmp_path / "ranks"), str(model)], stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    with controller:
        assert controller.stdout is not None
        pids = [int(word) for word in controller.stdout.readline().split()]
        assert len(pids) == 2
        controller.kill()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
