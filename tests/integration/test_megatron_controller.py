"""The process that drives a Megatron run never imports Megatron: its groups and its shim are the ranks' alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.integration.megatron_rig import OPTIMIZER
from tests.tiny import tiny

PROGRAM = """
import json, sys
from sluice.config import RunConfig
from sluice.orchestrate import api

api.train(RunConfig.model_validate_json(sys.stdin.read()))
print(sorted(name for name in sys.modules if name.partition(".")[0] == "megatron"))
"""


def test_a_run_with_megatron_leaves_its_own_process_without_it(tmp_path: Path) -> None:
    config = tiny(tmp_path, steps=1, train={"backend": "megatron", "optimizer": OPTIMIZER}, evaluation={"every": 0})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=config.model_dump_json(), text=True, capture_output=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert (config.folder / "ranks" / "policy" / "rank-0.log").exists()
