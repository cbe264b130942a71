"""The CPU shim: what megatron-core cannot do without, and that it is nowhere but in ranks.

A part goes when its test fails: then megatron-core trains without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.integration.megatron_rig import OPTIMIZER, tiny
from tests.integration.shim_program import CASES, NEEDED, STEPS
from tests.integration.test_ranks import batch
from tests.unit.train_cases import ratio_loss

from sluice.config.train import TrainConfig
from sluice.train.backends.megatron.shim import Part
from sluice.train.backends.torch import TorchTrainer

pytestmark = [pytest.mark.timeout(280), pytest.mark.slow]
Seen = dict[tuple[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model"), "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def seen(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """By case and part that was left out, what each rank says."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.integration.shim_program", str(model), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode == 0, done.stderr
    found: Seen = {}
    for line in (folder / "seen.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault((row.pop("case"), row.pop("without")), []).append(row)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_whole_shim_trains(seen: Seen, model: Path, case: str) -> None:
    alone = TorchTrainer(
        TrainConfig.model_validate({"optimizer": OPTIMIZER, "micro_batch_tokens": 64}), model, total_steps=10, seed=0
    )
    norms = [alone.step(batch(), ratio_loss).grad_norm for _ in range(STEPS)]
    for rank in seen[case, ""]:
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(("case", "part"), [(case, part) for case, parts in NEEDED.items() for part in parts])
def test_a_part_is_needed(seen: Seen, case: str, part: Part) -> None:
    """Without it a step fails, has another gradient, or leaves calls behind for good."""
    whole = {rank["rank"]: rank for rank in seen[case, ""]}
    without = {rank["rank"]: rank for rank in seen[case, part]}
    assert whole.keys() == without.keys()
    assert without != whole


def test_every_part_has_its_case() -> None:
    assert sorted(part for parts in NEEDED.values() for part in parts) == sorted(Part)


def test_importing_the_shim_changes_nothing() -> None:
    program = """
import sys, torch
from torch.overrides import _get_current_function_mode_stack
def state():
    answers = {name: id(value) for name, value in vars(torch.cuda).items()}
    methods = {name: id(value) for name, value in vars(torch.Tensor).items()}
    return answers, methods, _get_current_function_mode_stack()
before = state()
import sluice.train.backends.megatron.shim
assert state() == before
assert not [name for name in sys.modules if name.split(".")[0] == "megatron"]
"""
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)
