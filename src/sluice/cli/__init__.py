"""The `sluice` command. Heavy modules are imported inside the commands, so that `--help` is immediate.

Errors: a `SluiceError` is one block on stderr, `error: what and why`, `→ next move`, and its own exit code;
`SLUICE_TRACEBACK=1` shows the traceback instead. A wrong command or flag exits with 2, Ctrl-C with 130.

A command is a function in the module of its kind; `--help` lists them in the order of these imports.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from typer.exceptions import TyperException

# isort: off
from sluice.cli import running, steering, reading, installing

# isort: on
from sluice.cli.app import app, fail
from sluice.errors import SluiceError
from sluice.nearest import nearest

__all__ = ["app", "installing", "main", "reading", "run", "running", "steering"]


def _usage_message(error: TyperException) -> str:
    """A wrong command or flag, with the nearest valid one and where to look."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "sluice"
    message, hint = error.format_message().rstrip("."), f"see `{where} --help`"
    option = getattr(error, "option_name", None)
    if isinstance(option, str) and context is not None and message.startswith("No such option"):
        valid = [name for parameter in context.command.params for name in parameter.opts if name[0] == "-"]
        meant = nearest(option, [*valid, "--help"])
        message = f"no such flag: {option}"
        if "." in option:
            hint = f"recipe keys are given without dashes: {option.lstrip('-').partition('=')[0]}=VALUE"
        elif meant is not None:
            hint = f"did you mean {meant}? see `{where} --help`"
    return f"{message[0].lower()}{message[1:]}\n  → {hint}"


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        code: Any = app(arguments, prog_name="sluice", standalone_mode=False)
    except SluiceError as error:
        if os.environ.get("SLUICE_TRACEBACK"):
            raise
        fail(f"error: {error}")
        return error.exit_code
    except TyperException as error:
        fail(f"error: {_usage_message(error)}")
        return error.exit_code
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the `sluice` command."""
    sys.exit(run(sys.argv[1:]))
