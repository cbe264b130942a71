"""What a run came to, in one small file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sluice.errors import LogError
from sluice.obs.atomic import write_atomic
from sluice.obs.format import finite


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a run.

    Attributes:
        eval_before, eval_after: mean reward on the held-out prompts, before the first and after the last step.
        greedy_before, greedy_after: the same for greedy answers.
        steps: batches that were trained.
        wall_seconds: all time, that before a resume included.
        rollout_tokens_per_second, train_tokens_per_second: over the whole run.
        time_split: share of each phase.
        logprob_mismatch_mean_abs: mean |engine log-prob - trainer log-prob|, in nats a token.
        extra: anything else, JSON-able.
    """

    eval_before: float | None
    eval_after: float | None
    greedy_before: float | None
    greedy_after: float | None
    steps: int
    wall_seconds: float
    rollout_tokens_per_second: float
    train_tokens_per_second: float
    time_split: Mapping[str, float]
    logprob_mismatch_mean_abs: float
    seed: int
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> str:
        """As JSON text; a number that is not finite is null."""
        return json.dumps(finite(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write `to_json` to a file, as a whole."""
        write_atomic(path, self.to_json().encode())

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Inverse of `write`, but for numbers that were not finite, which are None.

        Raises:
            LogError: the file is missing or no summary.
        """
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise LogError(f"{path} is no summary: {error}", hint="it is written when a run ends") from error
