"""Prompts with responses to imitate, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sluice.config.sft import DemonstrationConfig, JsonlDemonstrations, PythonDemonstrations
from sluice.data.sources import jsonl
from sluice.data.sources.python import check_prompt, items
from sluice.data.sources.rows import Reading, check_text, read_rows
from sluice.errors import DataError
from sluice.types import Prompt


def load_demonstrations(
    config: DemonstrationConfig, prompts: Sequence[Prompt] = (), *, seed: int = 0
) -> list[tuple[Prompt, str]]:
    """Pairs of prompt and response, in the order of the source.

    Args:
        config: the source.
        prompts: training prompts, for a function to draw from.
        seed: for a function to draw with.

    Raises:
        DataError: missing, empty, or a row that is no demonstration.
        ConfigError: a function is missing or does not take `(prompts, seed, **params)`.
    """
    match config:
        case JsonlDemonstrations():
            reading = Reading(config.columns, "demonstration", on_bad_row=config.on_bad_row, need_answer=True)
            rows, _ = read_rows(str(config.path), jsonl.rows(config.path), reading)
            return [(row.prompt, row.answer) for row in rows]
        case PythonDemonstrations():
            return _from_function(config, prompts, seed)


def _from_function(config: PythonDemonstrations, prompts: Sequence[Prompt], seed: int) -> list[tuple[Prompt, str]]:
    pairs: list[tuple[Prompt, str]] = []
    found = items(config.path, [prompts, seed], config.params, "an iterable of (Prompt, response)")
    for number, item in enumerate(found, start=1):
        place = f"item {number} of {config.path}"
        kind, pair = type(item).__name__, cast("tuple[Any, ...]", item)
        if not isinstance(item, tuple) or len(pair) != 2:
            raise DataError(f"{place} is a {kind}, not a pair (Prompt, response)", hint="yield pairs")
        prompt, response = check_prompt(pair[0], place), pair[1]
        problem = check_text(response) if isinstance(response, str) else f"is a {type(response).__name__}, not a string"
        if problem:
            raise DataError(f"{place}: the response {problem}", hint="yield (Prompt, text)")
        pairs.append((prompt, response))
    if not pairs:
        raise DataError(f"{config.path} yielded no demonstration", hint="yield (Prompt, response) pairs")
    return pairs
