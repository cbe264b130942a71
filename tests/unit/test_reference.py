"""The reference pages are what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs.generate import pages


@pytest.mark.parametrize(("path", "text"), [pytest.param(*each, id=each[0].name) for each in pages().items()])
def test_a_page_is_what_the_code_says(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, f"run `make docs`: {path.name} is not what the code says"


def test_every_key_and_command_is_explained() -> None:
    for path, text in pages().items():
        empty = [line for line in text.splitlines() if line.startswith("| `") and line.endswith("|  |")]
        assert not empty, f"{path.name}: no word on {empty}"
