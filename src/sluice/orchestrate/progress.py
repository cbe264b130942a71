"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Progress:
    """Counters of a run that live across checkpoints.

    Attributes:
        before: the evaluation before the first batch, as JSON.
        held: an evaluation is under way, and this row of metrics is written with its result; empty: there is no row.
    """

    batch: int = 0
    step: int = 0
    rollout_tokens: int = 0
    trained_tokens: int = 0
    rollout_seconds: float = 0.0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    mismatch_sum: float = 0.0
    mismatch_steps: int = 0
    before: dict[str, Any] | None = None
    held: dict[str, float] | None = None

    @property
    def rows(self) -> int:
        """The last batch whose row of metrics was written; -1 where not even an evaluation before the first was."""
        return self.batch - (self.held is not None)
