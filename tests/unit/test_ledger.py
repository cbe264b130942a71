"""What is counted before a run against what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.tiny import tiny
from train_cases import make_samples, ratio_loss, scratch

from sluice.algos import make_algorithm
from sluice.orchestrate.ledger import GENERATES, TRAINS, ledger
from sluice.orchestrate.saver import snapshots
from sluice.orchestrate.setup import make_critic
from sluice.train.backends.critic import TorchCritic
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import Normaliser

WHAT = "a checkpoint that is being written"


@pytest.mark.parametrize("algorithm", [{"type": "grpo"}, {"type": "ppo"}], ids=["grpo", "ppo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_that_is_written_is_counted(tmp_path: Path, dtype: str, algorithm: dict[str, Any]) -> None:
    """All tensors that a snapshot writes, against the entry; the critic's head and counters are not counted."""
    model = scratch(tmp_path / "model", hidden_size=64)
    config = tiny(tmp_path, train={"dtype": dtype, "micro_batch_tokens": 64}, algorithm=algorithm)
    method = make_algorithm(config.algorithm, max_new_tokens=8)
    (entry,) = (entry for entry in ledger(config, method, model, "cpu").entries if entry.what == WHAT)
    assert entry.when == {GENERATES, TRAINS}
    trainer = TorchTrainer(config.train, model, total_steps=2, seed=0)
    trainer.step(make_batch(make_samples((12, 9)), budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    critic = make_critic(config, method, model, trainer, device="cpu")
    assert critic is None or isinstance(critic, TorchCritic)
    expected = 0
    for part, write in snapshots(trainer, critic, copy=True).items():
        folder = tmp_path / "checkpoint" / part
        folder.mkdir(parents=True)
        write(folder)
        for file in folder.glob("*.safetensors"):
            tensors = {name: t for name, t in load_file(file).items() if not name.startswith(("rng/", "step/"))}
            expected += sum(tensor.nbytes for tensor in tensors.values())
    if critic is not None:  # without moments before its first update
        expected += 8 * sum(parameter.numel() for parameter in critic.model.parameters())
    assert entry.size == pytest.approx(expected, rel=0.01)


def test_a_run_that_waits_for_its_checkpoints_has_no_copy(tmp_path: Path) -> None:
    model = scratch(tmp_path / "model")
    config = tiny(tmp_path, checkpoint={"background": False})
    counted = ledger(config, make_algorithm(config.algorithm, max_new_tokens=8), model, "cpu")
    assert WHAT not in [entry.what for entry in counted.entries]
    assert counted.snapshot == 0
