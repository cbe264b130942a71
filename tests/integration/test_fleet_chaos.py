"""A hundred agents, two engines, a weight update every two seconds, one engine killed: every token is accounted for."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from benchmarks.fleet_chaos import run, verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_token_is_what_the_engines_sampled_and_the_clients_saw(tmp_path: Path) -> None:
    happened = asyncio.run(run(tmp_path, sessions=100, questions=3, every=2.0))
    figures = verify(happened)  # raises unless segments, turns, tokens and log-probs agree
    print(figures)
    assert figures["turns"] >= 300
    assert figures["updates"] >= 3
    assert figures["versions_in_turns"] >= 3
    assert not list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*")), "the killed server's tensors stay in memory"
