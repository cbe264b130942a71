"""Engines' environments: what is refused, what is found, what a failed installation leaves. Nothing is downloaded:
pip is told to use no index."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest

from sluice import engines_install
from sluice.engines_install import chosen, install, listed, missing_libraries
from sluice.errors import ConfigError, EngineError
from sluice_engine import environments
from sluice_engine.environments import BUILDS, MARKER


def silent(line: str) -> None:
    assert line


def test_locks_ship_with_the_package_and_pin_exactly() -> None:
    for build in BUILDS:
        pins = [line for line in environments.lock_of(build).read_text().splitlines() if not line.startswith("#")]
        assert all(line.count("==") == 1 for line in pins)
        assert {"torch==2.13.0", "sglang==0.5.21", "smg==1.13.0"} <= set(pins)
        assert len({line.split("==")[0].lower() for line in pins}) == len(pins)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="was not made by"):
        install("cpu", tmp_path / "mine", say=silent)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="was not made by"):
        install("cpu", tmp_path / "file", say=silent)


def test_an_environment_that_is_there_is_not_touched(tmp_path: Path) -> None:
    python = environments.python_in(tmp_path / "there")
    python.parent.mkdir(parents=True)
    python.write_text("")
    (tmp_path / "there" / MARKER).write_text(environments.stamp_of("cpu"))
    said: list[str] = []
    assert install("cpu", tmp_path / "there", say=said.append, environ={"PYTHON": "/nowhere"}) == python
    assert said[0] == f"{tmp_path / 'there'} is up to date"


def test_a_failed_installation_is_told_and_done_afresh(tmp_path: Path) -> None:
    """An interpreter that makes no environment: the step fails, the marker stays empty, the next run starts over."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\ncase "$1" in -c) exec {sys.executable} "$@";; esac\necho "no space left"\nexit 3\n')
    fake.chmod(0o755)
    if sys.version_info[:2] != (3, 11):
        fake.write_text(fake.read_text().replace(f"exec {sys.executable}", "echo 3.11; exit 0; true"))
    target = tmp_path / "engine"
    for _ in range(2):
        with pytest.raises(EngineError, match=r"failed with exit code 3(?s:.*)no space left"):
            install("cpu", target, say=silent, environ={"PYTHON": str(fake)})
        assert environments.state("cpu", target) == "incomplete"
        assert (target / "install.log").read_text() == "no space left\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("#!/bin/sh\necho 3.9\n", "is Python 3.9, the lock is for 3.11"),
        ("#!/bin/sh\necho \"No module named 'ensurepip'\" >&2\nexit 1\n", "cannot make environments: No module named"),
        (None, "cannot run"),
    ],
)
def test_the_wrong_python_is_named(tmp_path: Path, text: str | None, fault: str) -> None:
    python = tmp_path / "python"
    if text is not None:
        python.write_text(text)
        python.chmod(0o755)
    with pytest.raises(ConfigError, match=fault) as caught:
        install("cpu", tmp_path / "engine", say=silent, environ={"PYTHON": str(python)})
    assert "PYTHON=/path/to/python3.11" in caught.value.hint
    assert not (tmp_path / "engine").exists()


def test_two_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_install, "WAIT_SECONDS", 0.0)
    with (tmp_path / "engine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EngineError, match="another installation"):
            install("cpu", tmp_path / "engine", say=silent)


def test_a_full_disk_is_told_before_anything_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_install, "NEEDED_BYTES", {"cpu": 2**62})
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3.11\n")
    python.chmod(0o755)
    with pytest.raises(EngineError, match="the cpu build needs"):
        install("cpu", tmp_path / "engine", say=silent, environ={"PYTHON": str(python)})
    assert not (tmp_path / "engine").exists()


def test_the_build_that_is_asked_for() -> None:
    assert chosen("sglang", cpu=False, cuda=True, rocm=False) == "cuda"
    with pytest.raises(ConfigError, match="--cpu and --rocm"):
        chosen("sglang", cpu=True, cuda=False, rocm=True)
    with pytest.raises(ConfigError) as caught:
        chosen("sglnag", cpu=True, cuda=False, rocm=False)
    assert caught.value.hint == "did you mean sglang?"


def test_the_list_shows_every_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_HOME", str(tmp_path))
    (tmp_path / "engines" / "sglang-cuda").mkdir(parents=True)
    (tmp_path / "engines" / "sglang-cuda" / MARKER).touch()
    assert [(row.build, row.state) for row in listed()] == [
        ("cpu", "missing"), ("cuda", "incomplete"), ("rocm", "missing"),
    ]  # fmt: skip
    assert str(listed()[0]).endswith(os.fspath(tmp_path / "engines" / "sglang-cpu"))


def test_missing_system_libraries_are_named_as_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_install, "RDMA", {"libc.so.6": "libc6", "libnobodyhasthis.so.9": "libnobody9"})
    assert missing_libraries() == ["libnobody9"]
