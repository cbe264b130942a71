"""Prompts of several named tasks. The name of a part is the task of its prompts."""

from __future__ import annotations

from dataclasses import replace

from sluice.config.data import MixPart, MixSource, SourceConfig
from sluice.data.sources import load_prompts, split
from sluice.errors import DataError
from sluice.types import Prompt


def load(config: MixSource, *, eval_prompts: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and held-out ones, of all parts in their order.

    Args:
        config: the parts.
        eval_prompts: held-out prompts of all parts that say nothing themselves, shared out equally.
        seed: another seed holds out others.

    Raises:
        DataError: a part has no prompt, or none is left to train on; it is named.
        ConfigError: see `load_prompts`.
    """
    silent = [part for part in config.parts if part.eval is None and part.eval_prompts is None]
    train: list[Prompt] = []
    held_out: list[Prompt] = []
    for part in config.parts:
        wanted = part.eval_prompts or 0
        if part in silent:
            place = silent.index(part)
            wanted = eval_prompts // len(silent) + (place < eval_prompts % len(silent))
        try:
            mine = _tagged(part, part.source)
            kept, apart = split(mine, wanted, seed)
            train += kept
            held_out += apart if part.eval is None else _tagged(part, part.eval)
        except DataError as error:
            raise DataError(f"task {part.name!r}: {error.args[0]}", hint=error.hint) from error
    return train, held_out


def check_tasks(config: MixSource, train: list[Prompt]) -> None:
    """Raise DataError, naming it, when nothing of a task is left to train on."""
    left = {prompt.task for prompt in train}
    for part in config.parts:
        if part.name not in left:
            raise DataError(
                f"task {part.name!r} has no prompt to train on: every one has the text of a held-out prompt",
                hint="give it more prompts, or hold out others",
            )


def _tagged(part: MixPart, source: SourceConfig) -> list[Prompt]:
    """Prompts with the part's name as their task and before their id, so that ids of two parts never meet."""
    return [replace(prompt, id=f"{part.name}:{prompt.id}", task=part.name) for prompt in load_prompts(source)]
