"""Recipes that are Python: import the file, call the function."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from sluice.config.problems import Places, problems_of, refuse
from sluice.config.run import RunConfig
from sluice.config.shape import Table, as_table
from sluice.errors import ConfigError, SluiceError
from sluice.nearest import nearest


def call_recipe(path: Path, function: str) -> RunConfig | Table:
    """What the function in the file returns. The file may import its neighbours."""
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        recipe = _function(_module(path), path, function)
        value = recipe()
    except SluiceError:
        raise
    except ValidationError as error:
        places = Places({(): _place(path, error)})
        raise refuse(f"{path}:{function}", problems_of(error, places)) from error
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"the recipe raised {message}  [{_place(path, error)}]", hint="SLUICE_TRACEBACK=1 shows where"
        ) from error
    finally:
        sys.path.remove(folder)
    table = as_table(value)
    if isinstance(value, RunConfig) or table is not None:
        return value if table is None else table
    raise ConfigError(f"{path}:{function}() returned {type(value).__name__}; a recipe returns a RunConfig or a dict")


def _module(path: Path) -> ModuleType:
    name = f"sluice_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file has a spec"
    assert spec.loader is not None, "and a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look their module up
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, path: Path, name: str) -> Callable[[], Any]:
    recipe = getattr(module, name, None)
    if recipe is None:
        own = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        public = [n for n in own if not n.startswith("_")]
        meant = nearest(name, public)
        raise ConfigError(
            f"{path} has no function {name!r}; it has {', '.join(public) or 'none'}",
            hint=f"did you mean {path}:{meant}?" if meant else f"name one: {path}:FUNCTION",
        )
    if not callable(recipe):
        raise ConfigError(f"{path}:{name} is a {type(recipe).__name__}; a recipe is a function")
    required = [
        parameter.name
        for parameter in inspect.signature(recipe).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required:
        raise ConfigError(
            f"{path}:{name}() needs {', '.join(required)}: the command line calls a recipe without arguments",
            hint="give every parameter a default",
        )
    return recipe


def _place(path: Path, error: Exception) -> str:
    """The last line of the recipe itself that the error passed through."""
    here = path.resolve()
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == here:
        return f"{path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == here]
    return f"{path}:{lines[-1]}" if lines else str(path)
