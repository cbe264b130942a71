"""What ranks write of a model is read as one, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sluice.errors import TrainError
from sluice.train.ranks.weights import read_weights, sizes_of, write_weights


def test_parts_are_read_in_the_order_of_their_files(tmp_path: Path) -> None:
    save_file({"c": torch.ones(2)}, tmp_path / "rank-1.safetensors")
    save_file({"b": torch.zeros(3, dtype=torch.bfloat16), "a": torch.arange(4)}, tmp_path / "rank-0.safetensors")
    found = dict(read_weights(tmp_path))
    assert list(found) == ["a", "b", "c"]
    assert found["b"].dtype == torch.bfloat16
    assert found["a"].tolist() == [0, 1, 2, 3]


def test_what_is_written_in_turn_is_what_the_library_reads(tmp_path: Path) -> None:
    """Transposed, empty and single numbers too."""
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(5, 3).T, "a": torch.randn(7).bfloat16(), "none": torch.zeros(0, 4), "one": torch.tensor(2.5),
        "half": torch.randn(3).half(), "ä.wide": torch.randn(2, 2, dtype=torch.float64),
    }  # fmt: skip
    file = tmp_path / "rank-0.safetensors"
    write_weights(file, sizes_of(tensors), iter(tensors.items()))
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert all(each.data_ptr() % each.element_size() == 0 for each in found.values())
    with pytest.raises(AssertionError, match="wide"):
        write_weights(file, sizes_of(tensors), list(tensors.items())[:-1])
    with pytest.raises(AssertionError):
        write_weights(file, sizes_of({"b": torch.ones(2)}), [("b", torch.ones(3))])


def test_a_tensor_that_is_there_twice_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for rank, names in enumerate(("ab", "bc", "cd")):
        save_file({name: torch.ones(1) for name in names}, tmp_path / f"rank-{rank}.safetensors")
    with pytest.raises(TrainError, match=r"'b' more than once, in rank-0.safetensors and rank-1.safetensors, and 1 fu"):
        next(read_weights(tmp_path))


def test_ranks_that_write_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no rank wrote weights"):
        next(read_weights(tmp_path))
