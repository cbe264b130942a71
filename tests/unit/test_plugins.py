"""Loading what a recipe names, and what a person reads when that fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

import pytest

from sluice.errors import ConfigError
from sluice.plugins import check_protocol, load_object


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def failure(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_object(path, expects="a function (prompt, answer) -> float")
    return str(caught.value)


def test_loads_files_and_modules(folder: Path) -> None:
    (folder / "mine.py").write_text("import beside\nclass A:\n    value = beside.VALUE\nclass B(A): ...\n")
    (folder / "beside.py").write_text("VALUE = 7\n")
    assert load_object("mine.py:A.value", expects="a number") == 7
    assert load_object("json.decoder:JSONDecoder.decode", expects="a function").__name__ == "decode"
    again = load_object(str(folder / "mine.py") + ":A", expects="a class")
    assert again is load_object("mine.py:A", expects="a class"), "one file is one module, however it is named"


@pytest.mark.parametrize(
    "path, parts",
    [
        ("reward.py:score", ["reward.py does not exist", "a function (prompt, answer) -> float", "'rewards.py'"]),
        ("nowhere/reward.py:score", ["nor does its folder", "working directory"]),
        ("rewards.py:scores", ["rewards.py has no 'scores'", "did you mean 'score'?"]),
        ("empty.py:score", ["empty.py has no 'score'", "defines nothing"]),
        ("broken.py:f", ["importing broken.py failed: ZeroDivisionError: division by zero", "broken.py:2)"]),
        ("syntax.py:f", ["importing syntax.py failed: SyntaxError", "syntax.py:1)"]),
        ("leaves.py:f", ["importing leaves.py failed: SystemExit: 3"]),
        ("needs.py:f", ["importing needs.py failed: ModuleNotFoundError: No module named 'not_there_at_all'"]),
        ("not_there_at_all:f", ["no module 'not_there_at_all'", "install it in this environment"]),
        ("rewards:score", ["no module 'rewards'", "write the path: rewards.py:NAME"]),
        ("json.decodr:f", ["no module 'json.decodr'", "did you mean 'json.decoder'?"]),
        ("json:lods", ["json has no 'lods'", "did you mean 'loads'?"]),
        ("rewards.py", ["does not name a function", "file.py:name"]),
    ],
)
def test_says_what_is_wrong(folder: Path, path: str, parts: list[str]) -> None:
    (folder / "rewards.py").write_text("def score(prompt, answer): return 1.0\n")
    (folder / "empty.py").write_text("")
    (folder / "broken.py").write_text("x = 1\ny = 1 / 0\n")
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    (folder / "needs.py").write_text("import not_there_at_all\n")
    text = failure(path)
    for part in parts:
        assert part in text
    assert "→" in text, "every message has a next move"


def test_a_mended_file_loads_after_a_failure(folder: Path) -> None:
    (folder / "mend.py").write_text("1 / 0\n")
    failure("mend.py:f")
    (folder / "mend.py").write_text("def f(): return 1  # mended\n")
    assert load_object("mend.py:f", expects="a function")() == 1


class Base(Protocol):
    name: str

    def load(self, state: dict[str, int]) -> None: ...


class Shape(Base, Protocol):
    def next(self, item: int, *, deep: bool) -> int: ...

    @property
    def size(self) -> int: ...


class Fits:
    name, size = "a", 1

    def load(self, state: object) -> None: ...

    def next(self, item: int, deep: bool = False, more: int = 0) -> int:
        return item


def test_protocol() -> None:
    check_protocol(Fits(), Shape, "x.py:Fits")

    class Misspelt(Fits):
        nxt = Fits.next
        next = None

    class Short(Fits):
        def next(self, item: int) -> int:  # type: ignore[override]
            return item

    class Lacks:
        name, size = "a", 1

        def loads(self, state: object) -> None: ...

    with pytest.raises(ConfigError, match=r"x\.py:M: Misspelt\.next is no method"):
        check_protocol(Misspelt(), Shape, "x.py:M")
    with pytest.raises(ConfigError, match=r"Short\.next does not fit Shape: .*'deep'.*it is \(item: "):
        check_protocol(Short(), Shape, "x.py:S")
    with pytest.raises(ConfigError, match=r"has no 'load'; Shape needs it\n  → did you mean 'loads'\?"):
        check_protocol(Lacks(), Shape, "x.py:L")
