"""Versions, publishing, activating: immutable, checksummed, and never half applied without a word."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sluice.errors import WeightsError
from sluice.types import Version
from sluice.weights.base import Published
from sluice.weights.lineage import Born, Lineage
from sluice.weights.store import WeightStore, activate


class Source:
    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"of another version")
    (model / "model.safetensors.index.json").write_text("{}")
    return WeightStore(tmp_path / "weights", model, Lineage())


def test_a_version_is_a_copy_with_a_name_a_parent_and_a_checksum(store: WeightStore) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    first = store.publish(Source(a=weight, b=torch.ones(2, dtype=torch.bfloat16)), 0)
    weight += 1
    second = store.publish(Source(a=weight, b=torch.ones(2, dtype=torch.bfloat16)), 1)
    assert first.manifest.version == Version(0)
    assert (second.manifest.version, second.manifest.parent) == (Version(1), Version(0))
    assert first.manifest.checksum != second.manifest.checksum
    assert second.manifest.num_bytes == 6 * 4 + 2 * 2
    assert second.manifest.tensors["b"].dtype == "bfloat16"
    assert first.manifest.tensors["b"] == second.manifest.tensors["b"]


def test_the_folder_is_what_an_engine_loads_and_appears_whole(store: WeightStore) -> None:
    published = store.publish(Source(a=torch.full((3,), 2.0)), 4)
    folder = published.folder()
    assert sorted(each.name for each in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_file(folder / "model.safetensors")["a"], torch.full((3,), 2.0))
    assert published.folder() == folder
    store.publish(Source(a=torch.zeros(3)), 5)
    assert not folder.exists(), "a released version leaves no files"


def test_a_folder_that_cannot_be_written_says_so(store: WeightStore, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("in the way")
    with pytest.raises(WeightsError, match=r"version 0\.0 could not be written"):
        store.publish(Source(a=torch.zeros(1)), 0).folder()


def test_a_source_must_yield_every_name_once(store: WeightStore) -> None:
    class Twice:
        def named_weights(self) -> Iterator[tuple[str, Tensor]]:
            yield "a", torch.zeros(1)
            yield "a", torch.zeros(1)

    with pytest.raises(WeightsError, match="yields the parameter a twice"):
        store.publish(Twice(), 0)
    with pytest.raises(WeightsError, match="no parameters"):
        store.publish(Source(), 0)


class Sink:
    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    @property
    def name(self) -> str:
        return "engine-7"

    async def apply(self, published: Published) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise WeightsError("checksum of a differs")


def test_a_failed_apply_is_tried_once_more_and_then_raised(store: WeightStore) -> None:
    published = store.publish(Source(a=torch.zeros(1)), 3)
    patient = Sink(failures=1)
    asyncio.run(activate(published, [patient]))
    assert patient.calls == 2
    with pytest.raises(WeightsError, match=r"engine-7 did not take version 3\.0, nor on a second try: checksum"):
        asyncio.run(activate(published, [Sink(failures=2)]))


def lineage() -> Lineage:
    """0 ← 1 ← 2 ← 3, then resumed from 1: 2.1 ← 3.1."""
    line = Lineage([Born(Version(s), Version(s - 1) if s else None, f"c{s}") for s in range(4)])
    line.current = Version(1)
    line.name(2, Version(1), "other")
    line.name(3, Version(2, 1), "other still")
    return line


def test_lag_is_counted_along_the_lineage() -> None:
    line = lineage()
    assert line.current == Version(3, 1)
    assert [line.lag(v) for v in (Version(3, 1), Version(2, 1), Version(1), Version(0))] == [0, 1, 2, 3]


def test_an_abandoned_version_is_never_current_and_counts_from_the_fork() -> None:
    line = lineage()
    assert [line.in_line(v) for v in (Version(0), Version(1), Version(2), Version(3), Version(2, 1))] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert [line.lag(Version(2)), line.lag(Version(3))] == [2, 2]
    line.current = Version(2, 1)
    assert line.lag(Version(3)) == 1
    line.current = Version(1)
    assert line.lag(Version(2)) == 1, "at least one: such weights were never those in use"
    with pytest.raises(WeightsError, match=r"9\.0 was never published"):
        line.lag(Version(9))


def test_a_lag_is_found_without_the_whole_history() -> None:
    looked_at: list[Version] = []

    class Watched(dict[Version, Born]):
        def __getitem__(self, version: Version) -> Born:
            looked_at.append(version)
            return super().__getitem__(version)

    line = Lineage(Born(Version(2 * s), Version(2 * s - 2) if s else None, "") for s in range(1000))
    line.current = Version(1998)
    line._born = Watched(line._born)
    assert [line.lag(Version(1998)), line.lag(Version(1992)), line.in_line(Version(1994))] == [0, 6, True]
    assert not line.in_line(Version(1993))
    assert len(looked_at) < 20
    assert line.lag(Version(0)) == 1998
    assert len(looked_at) > 1000, "what is watched is what is walked"


def test_rewinding_gives_a_version_its_name_back() -> None:
    line = lineage()
    other = Lineage()
    other.load_state_dict(line.state_dict())
    assert other.state_dict() == line.state_dict()
    other.rewind(Version(2, 1))
    assert other.current == Version(1)
    assert other.name(2, other.current, "other") == Version(2, 1)
    other.rewind(Version(0))
    assert other.current is None
    assert other.name(0, None, "new bits") == Version(0, 1)


def test_versions_survive_text_and_integers() -> None:
    for version in (Version(0), Version(7, 3), Version(2_000_000, 1)):
        assert Version.parse(str(version)) == version
        assert Version.from_code(version.code) == version
