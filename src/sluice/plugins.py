"""Load what a recipe names as `file.py:name` or `module:name`, with errors that say what to do."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from sluice.errors import ConfigError
from sluice.nearest import did_you_mean, nearest


def load_object(path: str, *, expects: str) -> Any:
    """The object that `path` names.

    A file is imported once as long as it is not edited, and its folder is put at the end of `sys.path`, so that it may
    import its neighbours.

    Args:
        path: `file.py:name` (relative to the working directory) or `package.module:name`; the name may be
            dotted.
        expects: what the caller needs, for error messages: "a function (prompt, answer) -> float".

    Raises:
        ConfigError: the file, the module or the name is missing, or importing it raised.
    """
    where, _, name = path.rpartition(":")
    if not where or not name:
        raise ConfigError(f"{path!r} does not name {expects}", hint="write it as file.py:name or package.module:name")
    module = _load_file(Path(where), expects) if where.endswith(".py") else _load_module(where, expects)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in dir(found) if not each.startswith("_")]
            raise ConfigError(
                f"{where} has no {name!r}; {expects} was expected there",
                hint=did_you_mean(part, public, otherwise=f"{where} defines nothing; define {name} in it"),
            )
        found = getattr(found, part)
    return found


_FILES: dict[str, Path] = {}
"""Files of the user's own code that were loaded here, by the name of their module."""


def loaded_files() -> tuple[Path, ...]:
    """Files that `load_object` has imported: another process imports them first, to know what it is sent."""
    return tuple(_FILES.values())


def load_files(files: Iterable[Path]) -> None:
    """Import what was loaded in another process. ConfigError when a file is gone, or was edited meanwhile and fails."""
    for file in files:
        _load_file(file, "a file of your own code")


def check_protocol(built: object, protocol: type, path: str) -> None:
    """Check that `built` has every method of `protocol`, and that each accepts the protocol's arguments.

    Raises:
        ConfigError: a method or attribute is missing, or has another signature.
    """
    for name, declared in _members(protocol).items():
        if not hasattr(built, name):
            raise ConfigError(
                f"{path} makes a {type(built).__name__}, which has no {name!r}; {protocol.__name__} needs it",
                hint=did_you_mean(name, [each for each in dir(built) if not each.startswith("_")]),
            )
        if not inspect.isfunction(declared):
            continue
        method = getattr(built, name)
        if not callable(method):
            raise ConfigError(
                f"{path}: {type(built).__name__}.{name} is no method",
                hint=f"define it as `def {name}{inspect.signature(declared)}`",
            )
        wanted = [each for each in inspect.signature(declared).parameters.values() if each.name != "self"]
        problem = signature_problem(
            method,
            sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in wanted),
            [each.name for each in wanted if each.kind is each.KEYWORD_ONLY],
        )
        if problem:
            raise ConfigError(
                f"{path}: {type(built).__name__}.{name} does not fit {protocol.__name__}: {problem}",
                hint=f"define it as `def {name}{inspect.signature(declared)}`",
            )


def signature_problem(function: Any, positional: int, keywords: list[str]) -> str:
    """Why `function` cannot be called with so many positional and these keyword arguments; empty if it can."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return "its signature cannot be read; wrap it in a `def`"
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError as error:
        names = list(signature.parameters)
        unknown = next((key for key in keywords if key not in names and repr(key) in str(error)), None)
        close = nearest(unknown, names) if unknown else None
        return f"{error}; it is {signature}" + (f"; did you mean {close!r}?" if close else "")
    return ""


def _members(protocol: type) -> dict[str, Any]:
    """Methods, properties and annotated attributes that a protocol declares, its bases' included."""
    members: dict[str, Any] = {}
    for base in reversed(protocol.__mro__):
        if not getattr(base, "_is_protocol", False):
            continue
        members |= dict.fromkeys(vars(base).get("__annotations__", {}))
        members |= {
            name: value
            for name, value in vars(base).items()
            if (not name.startswith("_") or name == "__call__")
            and (inspect.isfunction(value) or isinstance(value, property))
        }
    return members


def _load_file(file: Path, expects: str) -> ModuleType:
    if not file.is_file():
        if not file.parent.is_dir():
            raise ConfigError(
                f"{file} does not exist, nor does its folder; {expects} was expected there",
                hint=f"paths are relative to the working directory, {Path.cwd()}",
            )
        names = [each.name for each in file.parent.glob("*.py")]
        raise ConfigError(
            f"{file} does not exist; {expects} was expected there",
            hint=did_you_mean(file.name, names, otherwise=f"{file.parent} holds no Python file"),
        )
    resolved = file.resolve()
    digest = xxhash.xxh3_64(str(resolved).encode())
    digest.update(resolved.read_bytes())  # an edited file is imported again
    name = f"_sluice_{resolved.stem}_{digest.hexdigest()}"
    _FILES[name] = resolved
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} cannot be imported as Python", hint="name a .py file")
    if str(resolved.parent) not in sys.path:
        sys.path.append(str(resolved.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name], _FILES[name]
        raise ConfigError(f"importing {file} failed: {describe(error)}", hint="mend the file") from error
    return module


def _load_module(name: str, expects: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise ConfigError(
                f"there is no module {missing!r}; {expects} was expected in {name}", hint=_module_hint(name)
            ) from error
        raise ConfigError(
            f"importing {name} failed: {describe(error)}", hint="mend the module, or install what it needs"
        ) from error


def _module_hint(name: str) -> str:
    file = Path(*name.split(".")).with_suffix(".py")
    if file.is_file():
        return f"for a file write the path: {file}:NAME"
    close = nearest(name, sys.modules)
    meant = f"did you mean {close!r}? " if close else ""
    return f"{meant}install it in this environment, or name a file: path/to/file.py:NAME"


def describe(error: BaseException) -> str:
    """`ValueError: text (file.py:12)`: the exception's last line and where it was raised."""
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{last} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{last} ({frames[-1].filename}:{frames[-1].lineno})" if frames else last
