"""reasoning-gym as Sluice sees it: tasks by name, their parameters, entries that survive JSON, the scorer.

An entry holds tuples and integer keys, which plain JSON would turn into something else, and some
scorers then give the right answer less than 1. `encode` and `decode` are exact inverses on what entries
are made of, so that a prompt read back from the log is scored as when it was made.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, cast

import numpy as np

from sluice.errors import ConfigError
from sluice.nearest import did_you_mean

KEY = "reasoning_gym"
"""Key of `Prompt.metadata` that holds `dataset`, `params` and `entry`."""
_TAG = "__py__"


def load_task(dataset: str, params: Mapping[str, Any], *, size: int = 1, seed: int = 0) -> Any:
    """The reasoning-gym dataset of this name.

    Raises:
        ConfigError: unknown name (nearest one in the hint) or wrong parameters (names the field).
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    names = [name for name in DATASETS if name != "composite"]
    if dataset not in names:
        raise ConfigError(f"reasoning-gym has no dataset {dataset!r}", hint=did_you_mean(dataset, names))
    known = {each.name for each in fields(DATASETS[dataset][1])}
    for name in params:
        if name in ("size", "seed"):
            raise ConfigError(
                f"reasoning-gym dataset {dataset}: params.{name} is set by the source itself",
                hint=f"set `{name}` beside `params`",
            )
        if name not in known:
            raise ConfigError(
                f"reasoning-gym dataset {dataset} has no parameter {name!r}",
                hint=did_you_mean(name, known - {"size", "seed"}),
            )

    def build(chosen: Mapping[str, Any]) -> Any:
        return reasoning_gym.create_dataset(dataset, size=size, seed=seed, **chosen)

    try:
        return build(params)
    except Exception as error:
        guilty = [name for name in params if _works(build, params, without=name)] or list(params)
        shown = ", ".join(f"{name} = {params[name]!r}" for name in guilty)
        raise ConfigError(
            f"reasoning-gym dataset {dataset} refuses {f'params.{shown}' if shown else 'its defaults'}: "
            f"{str(error) or type(error).__name__}",
            hint=f"see `reasoning_gym.create_dataset({dataset!r})` for what it accepts",
        ) from error


def _works(build: Callable[[Mapping[str, Any]], Any], params: Mapping[str, Any], *, without: str) -> bool:
    """Whether the dataset can be made once this parameter has its default."""
    try:
        build({name: value for name, value in params.items() if name != without})
    except Exception:  # noqa: BLE001  the first failure is the one that is reported
        return False
    return True


@functools.lru_cache(maxsize=256)
def _scorer(dataset: str, params: str) -> Callable[[str, dict[str, Any]], float]:
    return load_task(dataset, cast("dict[str, Any]", decode(json.loads(params)))).score_answer


def scorer(dataset: str, params: Any) -> Callable[[str, dict[str, Any]], float]:
    """`score_answer` of a dataset with these encoded parameters; some scorers look at them."""
    return _scorer(dataset, json.dumps(params, sort_keys=True))


def encode(value: Any) -> Any:
    """`value` as JSON types: what JSON cannot hold is `{"__py__": [kind, content]}`.

    Raises:
        TypeError: an object of a kind that reasoning-gym entries are not made of.
    """
    if value is None or isinstance(value, str | bool):
        return str(value) if isinstance(value, str) else value
    if type(value) in (int, float):
        return value
    if isinstance(value, list):
        return [encode(each) for each in cast("list[Any]", value)]
    if isinstance(value, tuple):
        return {_TAG: ["tuple", [encode(each) for each in cast("tuple[Any, ...]", value)]]}
    if isinstance(value, Mapping):
        table = cast("Mapping[Any, Any]", value)
        if all(isinstance(key, str) for key in table) and _TAG not in table:
            return {str(key): encode(each) for key, each in table.items()}
        return {_TAG: ["dict", [[encode(key), encode(each)] for key, each in table.items()]]}
    if isinstance(value, np.generic):
        return encode(value.item())
    raise TypeError(f"a {type(value).__module__}.{type(value).__name__} cannot be kept in the log")


_MAKE: Mapping[str, Callable[[Any], Any]] = {
    "tuple": lambda content: tuple(decode(each) for each in content),
    "dict": lambda content: {decode(key): decode(each) for key, each in content},
}


def decode(value: Any) -> Any:
    """Inverse of `encode`."""
    if isinstance(value, list):
        return [decode(each) for each in cast("list[Any]", value)]
    if not isinstance(value, Mapping):
        return value
    table = cast("Mapping[str, Any]", value)
    if _TAG in table:
        kind, content = table[_TAG]
        return _MAKE[kind](content)
    return {key: decode(each) for key, each in table.items()}
