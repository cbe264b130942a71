"""The agent of `benchmarks.irregular`: as long as its draw says, whenever it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.irregular import AGENT, QUIET
from benchmarks.irregular_agent import TOOL_TOKENS, lognormal
from tests.tiny import tiny

from sluice.log import EpisodeRecord, Kind, LogReader
from sluice.obs.view import NullView
from sluice.orchestrate import api
from sluice.types import Author

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("tail", [1.0, 4.0, 20.0])
def test_a_draw_has_the_tail_that_it_is_asked_for(tail: float) -> None:
    chance = np.random.default_rng(0)
    drawn = [lognormal(chance, 16, tail) for _ in range(20_000)]
    assert np.median(drawn) == pytest.approx(16, rel=0.05)
    assert np.quantile(drawn, 0.99) == pytest.approx(16 * tail, rel=0.1)


def lengths(folder: Path, lag: int) -> dict[str, list[int]]:
    """Sampled tokens of each turn, by episode."""
    params = {**QUIET, "median": 3, "tail": 4.0, "limit": 12, "turns": 2}
    rollout: dict[str, Any] = {"runner": {"type": "python", "path": AGENT, "params": params}}
    config = tiny(
        folder, steps=2, rollout=rollout, data={"gate": {"max_lag": lag}}, evaluation={"every": 0, "greedy": False}
    )
    api.train(config, view=NullView())
    found: dict[str, list[int]] = {}
    for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,)):
        assert isinstance(entry.record, EpisodeRecord)
        episode = entry.record.episode
        found[episode.id] = [len(turn.ids) for turn in episode.sampled_turns()]
        observed = [len(turn.ids) for turn in episode.segments[0].turns if turn.author is not Author.SAMPLED]
        assert observed[1:] == [min(TOOL_TOKENS, observed[0])]
    return found


def test_lengths_depend_on_the_episode_alone(tmp_path: Path) -> None:
    first, other = lengths(tmp_path / "0", 0), lengths(tmp_path / "1", 1)
    both = first.keys() & other.keys()
    assert len(both) >= 32
    assert all(first[name] == other[name] for name in both)
    assert len({tuple(first[name]) for name in both}) > 10
