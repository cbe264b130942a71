"""The notebook runs from its first cell to its last, in a kernel of its own, and its model learns."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_the_notebook_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    notebook = nbformat.read(ROOT / "examples" / "first_run.ipynb", as_version=4)
    NotebookClient(notebook, timeout=350, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(
        output["text"] for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )
    found = re.search(r"held-out accuracy (\S+) → (\S+)", printed)
    assert found, printed
    assert float(found[2]) > float(found[1]) + 0.1
    assert (tmp_path / "runs" / "easy" / "summary.json").exists()
