"""What ranks write of a model is read as one, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sluice.errors import TrainError
from sluice.train.ranks.weights import read_weights


def test_parts_are_read_in_the_order_of_their_files(tmp_path: Path) -> None:
    save_file({"c": torch.ones(2)}, tmp_path / "rank-1.safetensors")
    save_file({"b": torch.zeros(3, dtype=torch.bfloat16), "a": torch.arange(4)}, tmp_path / "rank-0.safetensors")
    found = dict(read_weights(tmp_path))
    assert list(found) == ["a", "b", "c"]
    assert found["b"].dtype == torch.bfloat16
    assert found["a"].tolist() == [0, 1, 2, 3]


def test_a_tensor_that_is_there_twice_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for rank, names in enumerate(("ab", "bc", "cd")):
        save_file({name: torch.ones(1) for name in names}, tmp_path / f"rank-{rank}.safetensors")
    with pytest.raises(TrainError, match=r"'b' more than once, in rank-0.safetensors and rank-1.safetensors, and 1 fu"):
        next(read_weights(tmp_path))


def test_ranks_that_write_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no rank wrote weights"):
        next(read_weights(tmp_path))
