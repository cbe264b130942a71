"""`sluice doctor`: each line, and the exit code."""

from __future__ import annotations

import json
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import pytest

from sluice import doctor
from sluice.cli import run
from sluice.doctor import GIB, Check, examine
from sluice_engine import environments

Usage = namedtuple("Usage", "total used free")


def found(name: str, checks: list[Check]) -> Check:
    return next(check for check in checks if check.name == name)


def test_every_line_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--runs-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert run(["doctor", "--runs-dir", str(tmp_path), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    names = ["python", "versions", "device", "memory", "disk", "cores", "shared memory", "sglang"]
    assert [check["name"] for check in checks] == names
    assert all(check["status"] == "ok" or check["move"] for check in checks), "what is not ok has a next move"
    assert all(check["found"] in text for check in checks if check["name"] not in ("memory", "disk"))


def test_versions_against_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    numpy = version("numpy")
    lock.write_text(f"# a comment\nnumpy=={numpy}\ntorch=={version('torch').partition('+')[0]}\n")
    assert found("versions", examine(tmp_path, lock=lock)) == Check("versions", "ok", "all 2 packages as in the lock")
    lock.write_text("numpy==0.1\nno-such-package==1.0\n")
    check = found("versions", examine(tmp_path, lock=lock))
    assert check.status == "warn"
    assert check.found == f"missing: no-such-package; other: numpy {numpy} (lock: 0.1)"
    assert found("versions", examine(tmp_path, lock=tmp_path / "none")).status == "warn"


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(10 * GIB, 10 * GIB, GIB // 2))
    folder = tmp_path / "not" / "yet"
    assert run(["doctor", "--runs-dir", str(folder)]) == 1
    text = capsys.readouterr().out
    assert f"fail  disk           0.5 GiB free for {folder}\n" in text
    assert "→ free some space, or set runs_dir to another disk" in text
    assert not folder.exists(), "looking makes nothing"


def test_a_folder_of_somebody_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert found("disk", examine(tmp_path)).status == "fail"


def test_small_shared_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(64 * 1024**2, 0, 10 * GIB))
    check = found("shared memory", examine(tmp_path))
    assert (check.status, check.move) == (
        "warn",
        "start the container with --shm-size=2g, or use rollout.sglang.sync=disk",
    )


def test_the_engine_is_looked_for_under_sluice_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_HOME", str(tmp_path))
    check = found("sglang", examine(tmp_path))
    assert (check.status, check.found) == ("warn", "not installed")
    environment = tmp_path / "engines" / "sglang-cpu"
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    (environment / ".sluice-engine").write_text("of an older lock")
    move = "sluice engines install sglang --cpu"
    assert found("sglang", examine(tmp_path)) == Check("sglang", "warn", f"outdated at {environment}", move)
    (environment / ".sluice-engine").write_text(environments.stamp_of("cpu"))
    assert found("sglang", examine(tmp_path)) == Check("sglang", "ok", f"ready at {environment}")
