"""From a recipe to a `RunConfig`: a TOML or JSON file, or a Python function, plus dotted overrides.

    recipe → dict → overrides → complete → validate → frozen RunConfig

**References.** `demo.toml`, `run/config.json`, `demo.py` (its function `recipe`) or `demo.py:other`. The
function returns a `RunConfig` or a dict. It may have keyword parameters with defaults, for other Python code;
the command line always calls it without arguments.

**Paths.** A relative path in a recipe (`model.path`, a source's file, the file of a `file.py:name`) means the
recipe's own folder when it exists there, and becomes absolute; otherwise it is left as it stands, relative
to the working directory. A path in an override is relative to the working directory; so is `runs_dir`.
Inside the free-form tables (`params`, `architecture`, `chat_template_kwargs`) nothing is touched.

**Defaults.** A table changes the default that stands in its place, it does not reset it: `[data.strategy]`
with `samples = 16` alone keeps `type = "groups"`. A table of another `type` takes nothing of the default.

**Errors.** One `ConfigError` lists every problem: key, what is wrong, nearest valid name, and the place
(`recipe.toml:12`, `override 'train.lr=1'`, `--seed -1`, `recipe.py:recipe()`).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sluice.config.dump import resolved_json, resolved_toml, schema
from sluice.config.lines import Key, key_lines
from sluice.config.overrides import Override, OverrideError
from sluice.config.problems import Places, Problem, problems_of, refuse
from sluice.config.python_recipe import call_recipe
from sluice.config.rollout import RolloutConfig
from sluice.config.run import RunConfig
from sluice.config.shape import Table, as_list, as_table, as_written, fill_defaults
from sluice.errors import ConfigError
from sluice.nearest import nearest

__all__ = ["FREE_FORM", "PATHS", "load_recipe", "resolved_json", "resolved_toml", "schema"]

FREE_FORM = frozenset({"params", "architecture", "chat_template_kwargs", "args", "env", "speculative", "labels"})
"""Tables whose keys belong to somebody else's code."""
PATHS = frozenset(
    {"path", "python", "template", "tools", "command", "verify", "prompt_file", "chat_template", "replay"}
)
"""Keys that hold a file, `file.py:name`, or a list of words some of which may be files. Where `chat_template` is the
template itself (`model.scratch.tokenizer`), no file has its name."""
_TOML_PLACE = re.compile(r" \(at line (\d+), column \d+\)")
_SUFFIXES = (".toml", ".py", ".json")


def load_recipe(
    ref: str, overrides: Sequence[str] = (), *, flags: Mapping[str, tuple[str, object]] | None = None
) -> RunConfig:
    """The run that a recipe and overrides describe.

    Args:
        ref: a `.toml` or `.json` file, or `file.py[:function]`.
        overrides: `KEY=VALUE`, in order; a value is TOML or plain text; `none` unsets an optional key.
        flags: values of command-line flags, `{"seed": ("--seed", 3)}`, applied after the overrides.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: naming every problem and its place.
    """
    name, tree, known = _read(ref)
    problems: list[Problem] = []
    for argument in overrides:
        try:
            override = Override.parse(argument)
            for key in override.apply(tree):
                _replace_place(known, key, override.place)
        except OverrideError as error:
            problems.append(Problem((), str(error), error.place))
    for key, (flag, value) in (flags or {}).items():
        tree[key] = value
        _replace_place(known, (key,), f"{flag} {value}")
    try:
        config = RunConfig.model_validate(fill_defaults(RunConfig, tree))
    except ValidationError as error:
        raise refuse(name, [*problems, *problems_of(error, Places(known))]) from error
    if problems:
        raise refuse(name, problems)
    return config


def load_rollout(
    overrides: Sequence[str] = (), *, flags: Mapping[str, tuple[str, object]] | None = None
) -> RolloutConfig:
    """The rollout part alone, for what needs no recipe.

    Args:
        overrides: `rollout.KEY=VALUE`, in order.
        flags: values of command-line flags by dotted key under `rollout`, applied after the overrides.

    Raises:
        ConfigError: naming every problem and its place.
    """
    tree: Table = {"rollout": {}}
    known: dict[Key, str] = {(): "the command line"}
    problems: list[Problem] = []
    given = [(argument, "") for argument in overrides]
    given += [(f"rollout.{key}={value}", flag) for key, (flag, value) in (flags or {}).items()]
    for argument, flag in given:
        try:
            override = Override.parse(argument)
            if not override.key.startswith("rollout."):
                raise OverrideError("keys begin with 'rollout.' here: there is no training", override.place)
            for key in override.apply(tree):
                _replace_place(known, key[1:], flag or override.place)
        except OverrideError as error:
            problems.append(Problem((), str(error), error.place))
    try:
        config = RolloutConfig.model_validate(fill_defaults(RolloutConfig, tree["rollout"]))
    except ValidationError as error:
        found = [replace(one, key=("rollout", *one.key[1:])) for one in problems_of(error, Places(known))]
        raise refuse("the command line", [*problems, *found]) from error
    if problems:
        raise refuse("the command line", problems)
    return config


def _replace_place(known: dict[Key, str], key: Key, place: str) -> None:
    for inner in [inner for inner in known if inner[: len(key)] == key]:
        del known[inner]
    known[key] = place


def _read(ref: str) -> tuple[str, Table, dict[Key, str]]:
    """Name, dict form and places of a recipe."""
    path, function = _split(ref)
    if path.suffix == ".py":
        value = call_recipe(path, function)
        tree = as_written(value) if isinstance(value, RunConfig) else value
        known: dict[Key, str] = {(): f"{path}:{function}()"}
    else:
        tree, lines = _parse(path)
        known = {(): str(path)} | {key: f"{path}:{line}" for key, line in lines.items()}
    return ref, _rebased(tree, path.parent), known


def _split(ref: str) -> tuple[Path, str]:
    head, colon, function = ref.rpartition(":")
    path, function = (Path(head), function) if colon and head.endswith(".py") else (Path(ref), "recipe")
    if path.is_file() and path.suffix in _SUFFIXES:
        return path, function
    if path.is_file():
        raise ConfigError(f"recipe {ref}: not a {', '.join(_SUFFIXES)} file")
    what = "is a folder" if path.is_dir() else "no such file"
    near = _nearest_file(path)
    raise ConfigError(f"recipe {ref}: {what}", hint=f"did you mean {near}?" if near else "give the path of a recipe")


def _nearest_file(path: Path) -> Path | None:
    folders = dict.fromkeys((path, path.parent, Path("recipes")))
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    by_stem = {file.stem: file for file in reversed(files) if file.suffix in _SUFFIXES}
    meant = nearest(path.stem, by_stem)
    return by_stem[meant] if meant is not None else None


def _parse(path: Path) -> tuple[Table, dict[Key, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text), key_lines(text)
        tree = as_table(json.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_toml_fault(path, text, str(error))) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno} is not valid JSON: {error.msg}") from error
    if tree is None:
        raise ConfigError(f"{path} must hold a JSON object")
    return tree, {}


def _toml_fault(path: Path, text: str, message: str) -> str:
    place = _TOML_PLACE.search(message)
    line = int(place.group(1)) if place else text.count("\n") + 1
    what = _TOML_PLACE.sub("", message).removesuffix(" (at end of document)")
    return f"{path}:{line} is not valid TOML: {what}"


def _rebased(value: Any, folder: Path) -> Any:
    """`value` with the relative paths that exist in `folder` made absolute; see `PATHS`."""
    items = as_list(value)
    if items is not None:
        return [_rebased(item, folder) for item in items]
    table = as_table(value)
    if table is None:
        return value
    result: Table = {}
    for name, inner in table.items():
        if name in PATHS and isinstance(inner, str | Path):
            result[name] = _beside(str(inner), folder)
        elif name in PATHS and (words := as_list(inner)) is not None:
            result[name] = [_beside(word, folder) if isinstance(word, str) else word for word in words]
        else:
            result[name] = inner if name in FREE_FORM else _rebased(inner, folder)
    return result


def _beside(text: str, folder: Path) -> str:
    file, colon, name = text.rpartition(":")
    file, rest = (file, colon + name) if file.endswith(".py") else (text, "")
    here = folder / file
    return f"{here.resolve()}{rest}" if file and not Path(file).is_absolute() and _exists(here) else text


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # text of a template, longer than any name of a file
        return False
