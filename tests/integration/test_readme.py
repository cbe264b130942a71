"""Every block of README.md and docs/ that can be run is run, in order, as a newcomer would: one folder per page.

`bash` blocks are commands; `python`, `toml` and `json` blocks are files, named by their first line's comment, or
`questions.jsonl` for JSON lines. Blocks without a language show what tests elsewhere cover.
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


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page.name in QUICK else pytest.mark.slow, id=page.name) for page in PAGES],
)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    script = bin_folder / "sluice"
    script.write_text(f"#!{sys.executable}\nfrom sluice.cli import main\nmain()\n")
    script.chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    ran = 0
    for language, text in BLOCK.findall(page.read_text()):
        file = place(tmp_path, language, text)
        commands = [f"{sys.executable} {file.name}"] if file is not None and "import sluice" in text else []
        if language == "bash":
            commands = [line for line in text.splitlines() if line and not line.startswith("#")]
        for command in commands:
            done = subprocess.run(
                shlex.split(command, comments=True), cwd=tmp_path, env=environment, capture_output=True, text=True,
                timeout=280, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            ran += 1
    assert ran, f"{page.name} has blocks, but none was run"


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
