"""Checkpoints: whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sluice.checkpoint.store import CheckpointStore
from sluice.errors import CheckpointError


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "data.txt").write_text(text)

    return write


def test_the_newest_is_found_and_old_ones_are_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    for step in (3, 10, 5, 20):
        store.save(step, {"at": step}, {"model": writer(f"weights {step}")})
    assert [each.step for each in store.all()] == [10, 20]
    newest = store.latest()
    assert newest is not None
    assert newest.state() == {"at": 20}
    assert (newest.model / "data.txt").read_text() == "weights 20"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, {"model": writer("first")})
    again = store.save(1, {}, {"model": writer("second")})
    assert (again.model / "data.txt").read_text() == "second"
    assert len(store.all()) == 1


def test_a_failure_while_writing_leaves_the_old_ones_and_no_trace(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, {"model": writer("good")})

    def full(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch says when the disk is full

    with pytest.raises(CheckpointError, match="the checkpoint of step 2 could not be written"):
        store.save(2, {}, {"model": writer("fine"), "trainer": full})
    assert [each.name for each in tmp_path.iterdir()] == ["step-000001"]
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1


def test_torn_and_damaged_checkpoints(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, {}, {"model": writer("x" * 100)})
    (tmp_path / ".step-000003.tmp").mkdir()
    (tmp_path / "step-000004").mkdir()  # somebody copied a folder and was interrupted: no manifest
    newest = store.latest()
    assert newest is not None
    assert newest.step == 2
    store.save(1, {}, {"model": writer("y")})
    assert not (tmp_path / ".step-000003.tmp").exists(), "what a kill left is removed, whatever step comes next"
    file = newest.model / "data.txt"
    file.write_text("x" * 99 + "y")
    with pytest.raises(CheckpointError, match=r"data\.txt is not what was written"):
        store.latest()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model/data\.txt"):
        store.latest()
    manifest = json.loads((newest.folder / "manifest.json").read_text())
    (newest.folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this Sluice reads 1"):
        store.latest()
