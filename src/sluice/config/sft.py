"""Supervised fine-tuning: on its own (`sluice sft`), or as the warm start of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sluice.config.base import Part
from sluice.config.data import Columns, ImportPath
from sluice.config.train import TrainConfig


class DemonstrationColumns(Columns):
    """Which field of a row holds what."""

    answer: str = "response"
    """The demonstrated response."""


class JsonlDemonstrations(Part):
    """Rows of prompt and response."""

    type: Literal["jsonl"] = "jsonl"
    path: Path
    """The file."""
    columns: DemonstrationColumns = DemonstrationColumns()
    """Column mapping."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at an unreadable row, naming its line, or skip and count it."""


class PythonDemonstrations(Part):
    """A function `(prompts, seed) -> iterable of (Prompt, response)` over the training prompts."""

    type: Literal["python"] = "python"
    path: ImportPath
    """The function."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Extra keyword arguments."""


DemonstrationConfig = Annotated[JsonlDemonstrations | PythonDemonstrations, Field(discriminator="type")]


class PhaseConfig(Part):
    """What phases before RL share."""

    steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=64, ge=1)
    """Demonstrations, or pairs, a step."""
    train: TrainConfig = TrainConfig()
    """Optimizer and memory."""


class SftConfig(PhaseConfig):
    """Steps of cross-entropy on the responses."""

    demonstrations: DemonstrationConfig
    """What to imitate."""
