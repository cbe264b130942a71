"""Where prompts come from: files, folders, reasoning-gym, functions; and how some of them are held out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence

import xxhash

from sluice.config.data import (
    DatasetsSource,
    JsonlSource,
    ParquetSource,
    PythonSource,
    ReasoningGymSource,
    RowSource,
    SourceConfig,
)
from sluice.data.sources import datasets, jsonl, parquet, python, reasoning_gym
from sluice.data.sources.rows import Found, Reading, read_rows
from sluice.errors import DataError
from sluice.types import Prompt

_LOG = logging.getLogger(__name__)

__all__ = ["load_prompts", "split"]


def load_prompts(config: SourceConfig) -> list[Prompt]:
    """Every prompt of a source, in its order, with distinct ids.

    Raises:
        DataError: the source is missing, empty, or holds something that is no prompt.
        ConfigError: a function or its parameters are wrong.
    """
    match config:
        case JsonlSource(path=path):
            return _from_rows(config, str(path), jsonl.rows(path))
        case ParquetSource(path=path):
            return _from_rows(config, str(path), parquet.rows(path))
        case DatasetsSource(path=path, split=part, subset=subset):
            return _from_rows(config, f"{path} ({part})", datasets.rows(path, part, subset))
        case ReasoningGymSource():
            return reasoning_gym.load(config)
        case PythonSource():
            return python.load(config)


def _from_rows(config: RowSource, name: str, found: Iterable[Found]) -> list[Prompt]:
    rows, _ = read_rows(name, found, Reading.of(config))
    return [row.prompt for row in rows]


def split(prompts: Sequence[Prompt], eval_prompts: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Hold out `eval_prompts` prompts with distinct texts, chosen by a hash of text and seed.

    An equal text is never on both sides: a further prompt with the text of a held-out one is in neither.

    Args:
        prompts: of one source.
        eval_prompts: how many to hold out.
        seed: another seed holds out others.

    Returns:
        Prompts to train on, and held-out ones, both in the order of the source.

    Raises:
        DataError: too few distinct prompts.
    """
    if eval_prompts == 0:
        return list(prompts), []
    rank = {
        prompt.messages: xxhash.xxh3_128_intdigest(json.dumps([seed, prompt.messages]).encode()) for prompt in prompts
    }
    if len(rank) <= eval_prompts:
        raise DataError(
            f"{eval_prompts} prompts should be held out, but the source has {len(prompts)} prompts with "
            f"{len(rank)} distinct texts, so that none would be left to train on",
            hint="lower data.eval_prompts, give more prompts, or set data.eval to a source of its own",
        )
    chosen = set(sorted(rank, key=lambda text: rank[text])[:eval_prompts])
    train = [prompt for prompt in prompts if prompt.messages not in chosen]
    first = {prompt.messages: prompt for prompt in reversed(prompts)}
    held_out = [prompt for prompt in prompts if prompt.messages in chosen and first[prompt.messages] is prompt]
    left_out = len(prompts) - len(train) - len(held_out)
    if left_out:
        _LOG.warning("%d prompts have the text of a held-out one and are left out of training", left_out)
    return train, held_out
