"""Over a divided vocabulary, and over divided samples, everything is as over the whole, in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.timeout(200)]


def test_two_ranks_are_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.divided_program", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
