"""Every block of README.md and docs/ that can be run is run, in order, as a newcomer would: one folder per page.

`bash` blocks are run by bash; `python`, `toml` and `json` blocks are files, named by their first line's comment, or
`questions.jsonl` for JSON lines; a `python` block that imports sluice is run. `console` blocks are sessions: behind
`$ command` stands what it prints, some of its lines in their order, `…` for any text. A command that prints an error
fails. Blocks without a language show what tests elsewhere cover.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 280
"""Seconds that one block of commands may take."""
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(page for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if BLOCK.search(page.read_text()))

QUICK = ("README.md", "start.md")
"""What a newcomer reads first; the others train for a minute each."""


def place(folder: Path, language: str, text: str) -> Path | None:
    """Write a file block where its first line says; None for commands."""
    if language == "json":
        (folder / "questions.jsonl").write_text(text)
        return folder / "questions.jsonl"
    if language not in ("python", "toml"):
        return None
    named = re.match(r"# (\S+\.(?:py|toml))\n", text)
    assert named, f"a {language} block must name its file in its first line:\n{text}"
    file = folder / named[1]
    file.write_text(text)
    return file


def sessions(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a `console` block, each with the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    goes_on = False
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif goes_on:
            found[-1] = (f"{found[-1][0]}\n{line}", [])
        elif line.strip():
            found[-1][1].append(line)
        goes_on = line.endswith("\\")
    return found


def check_printed(said: list[str], printed: str) -> None:
    """Every line stands in what was printed, in this order; spaces are folded, `…` stands for any text."""
    at, folded = 0, [" ".join(line.split()) for line in printed.splitlines()]
    for line in said:
        pattern = re.compile(".*".join(re.escape(" ".join(part.split())) for part in line.split("…")))
        found = next((number for number in range(at, len(folded)) if pattern.fullmatch(folded[number])), None)
        assert found is not None, f"the page shows\n{line}\nwhich is not, or not there, in\n{printed[-4000:]}"
        at = found + 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page.name in QUICK else pytest.mark.slow, id=page.name) for page in PAGES],
)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, program in (
        ("sluice", f"#!{sys.executable}\nfrom sluice.cli import main\nmain()\n"),
        ("python", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'),
    ):
        (bin_folder / name).write_text(program)
        (bin_folder / name).chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    environment |= {f"WANDB_{name}_DIR": str(tmp_path / "wandb") for name in ("CACHE", "CONFIG", "DATA")}
    ran = 0
    for language, text in BLOCK.findall(page.read_text()):
        file = place(tmp_path, language, text)
        commands = [(f"python {file.name}", [])] if file is not None and "import sluice" in text else []
        if language == "bash":
            commands = [(text, [])]
        elif language == "console":
            commands = sessions(text)
        for command, said in commands:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, env=environment, capture_output=True,
                text=True, timeout=LIMIT, check=False,
            )  # fmt: skip
            fails = any(line.startswith("error:") for line in said)
            assert bool(done.returncode) == fails, f"$ {command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            check_printed(said, f"{done.stdout}\n{done.stderr}")
            ran += 1
    assert ran, f"{page.name} has blocks, but none was run"
