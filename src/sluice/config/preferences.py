"""Preference training on pairs: on its own (`sluice dpo`), or as a phase of a run before RL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sluice.config.base import Part
from sluice.config.data import Columns
from sluice.config.sft import PhaseConfig


class PairColumns(Columns):
    """Which field of a row holds what."""

    answer: str = "chosen"
    """The better response."""
    rejected: str = "rejected"
    """The worse response."""


class JsonlPairs(Part):
    """Rows of prompt, chosen and rejected."""

    type: Literal["jsonl"] = "jsonl"
    path: Path
    """The file."""
    columns: PairColumns = PairColumns()
    """Column mapping."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at an unreadable row, naming its line, or skip and count it."""


class RecordedPairs(Part):
    """Best against worst of each group in an earlier run's log, by total reward, token for token as sampled."""

    type: Literal["run"] = "run"
    path: Path
    """Folder of the run, such as `runs/demo`. Its tokenizer must be the model's."""
    min_gap: float = Field(default=0.0, ge=0)
    """Groups whose best and worst rewards are no further apart than this give no pair."""


PairConfig = Annotated[JsonlPairs | RecordedPairs, Field(discriminator="type")]


class PreferenceConfig(PhaseConfig):
    """Steps of DPO (arXiv 2305.18290). The reference is the model that the phase starts from."""

    pairs: PairConfig
    """What is preferred to what."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse strength of the pull towards the reference."""
