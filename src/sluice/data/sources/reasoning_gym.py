"""Prompts from any task of the reasoning-gym package, each with the entry its scorer needs."""

from __future__ import annotations

import logging
from typing import Any, cast

from sluice import gym
from sluice.config.data import ReasoningGymSource
from sluice.data.sources.rows import content_id
from sluice.errors import ConfigError, DataError
from sluice.types import Message, Prompt

_LOG = logging.getLogger(__name__)


def load(config: ReasoningGymSource) -> list[Prompt]:
    """`config.size` instances; one that repeats an earlier one is left out, and their number is logged.

    Raises:
        DataError: unknown dataset, wrong parameters, or the generator failed.
    """
    try:
        dataset = gym.load_task(config.dataset, config.params, size=config.size, seed=config.seed)
    except ConfigError as error:
        raise DataError(error.args[0], hint=error.hint) from error
    prompts: dict[str, Prompt] = {}
    for index in range(config.size):
        try:
            prompt = _prompt(config, cast("dict[str, Any]", dataset[index]))
        except Exception as error:
            raise DataError(
                f"reasoning-gym dataset {config.dataset} failed at instance {index}: {type(error).__name__}: {error}",
                hint="another seed or other params may work; otherwise report it to reasoning-gym",
            ) from error
        prompts.setdefault(prompt.id, prompt)
    repeated = config.size - len(prompts)
    if repeated:
        _LOG.warning(
            "reasoning-gym dataset %s: %d of %d instances repeat earlier ones and are left out",
            config.dataset, repeated, config.size,
        )  # fmt: skip
    return list(prompts.values())


def _prompt(config: ReasoningGymSource, entry: dict[str, Any]) -> Prompt:
    task = config.task or config.dataset
    messages = (Message("user", entry["question"]),)
    if config.system:
        messages = (Message("system", config.system), *messages)
    answer = "" if entry["answer"] is None else str(entry["answer"])  # some tasks have many right answers
    metadata = {
        gym.KEY: {
            "dataset": config.dataset,
            "params": gym.encode(config.params),
            "entry": gym.encode(entry),
        }
    }
    return Prompt(content_id(task, messages, answer), task, messages, answer, metadata)
