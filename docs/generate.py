"""Writes docs/reference/: what a recipe may hold, from the schema, and the commands, from the CLI.

    make docs

A test compares the pages with what this makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sluice.cli import app
from sluice.config.base import Part
from sluice.config.run import RunConfig

FOLDER = Path(__file__).parent / "reference"
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "at least", "max_length": "at most"}
PLAIN = {str: "string", int: "integer", float: "number", bool: "true/false", Path: "path", NoneType: "none"}
VALUES = {int: "N", float: "X", Path: "PATH"}


# ── the configuration ───────────────────────────────────────────────────────────────────────────────────────


def parts_in(annotation: Any) -> Iterator[type[Part]]:
    """The Part classes that a type mentions, in order."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for inner in get_args(annotation):
        yield from parts_in(inner)


def kind_of(annotation: Any) -> str:
    """A type in a reader's words; Parts as links to their sections."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind_of(each) for each in inner if each is not NoneType))
    if origin is Literal:
        return " or ".join(f"`{json.dumps(each)}`" for each in inner)
    if origin is tuple or origin is list:
        return f"list of {kind_of(inner[0])}"
    if origin is not None and inner:
        return f"table of {kind_of(inner[-1])}"
    if isinstance(annotation, type) and issubclass(annotation, Part):
        kind = annotation.model_fields.get("type")
        text = f'`"{kind.default}"`' if kind is not None else annotation.__name__
        return f"[{text}](#{annotation.__name__.lower()})"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(f'`"{each.value}"`' for each in annotation)
    return PLAIN.get(annotation, "any")


def bounds_of(field: FieldInfo) -> str:
    """Constraints of a field, such as `> 0`."""
    found = [f"{sign} {getattr(each, name)}" for each in field.metadata for name, sign in BOUNDS.items()
             if getattr(each, name, None) is not None]  # fmt: skip
    return ", ".join(found)


def default_of(field: FieldInfo) -> str:
    """A field's default as it would be written in a recipe; for a Part the word `defaults`."""
    value = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    if value is PydanticUndefined:
        return "**required**"
    if value is None:
        return "none"
    if isinstance(value, Part):
        kind = getattr(value, "type", None)
        return f'`{{ type = "{kind}" }}`' if kind else "its defaults"
    if isinstance(value, Enum):
        value = value.value
    return f"`{json.dumps(value, default=str, ensure_ascii=False)}`"


def cell(text: str) -> str:
    """Text inside a table: one line, bars escaped."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def section(part: type[Part], where: str) -> Iterator[str]:
    """Heading, docstring and table of one Part."""
    kind = part.model_fields.get("type")
    title = f' (`type = "{kind.default}"`)' if kind is not None else ""
    yield f"## {part.__name__}\n\n`{where}`{title}\n\n{(part.__doc__ or '').strip()}\n"
    rows = [(name, field) for name, field in part.model_fields.items() if name != "type"]
    if not rows:
        return
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, field in rows:
        kind_text = " ".join(filter(None, (kind_of(field.annotation), bounds_of(field))))
        yield f"| `{name}` | {cell(kind_text)} | {cell(default_of(field))} | {cell(field.description or '')} |"
    yield ""


def config_page() -> str:
    """Every key of a recipe, part by part, each part under the first place where it may stand."""
    lines = [
        "# Configuration\n",
        "Every key of a recipe, made from the code by `make docs`. A recipe is TOML, or Python that returns the same",
        "table; any key can be replaced on the command line: `sluice train recipe.toml train.optimizer.lr=1e-4`. An",
        "unknown key is an error that names the nearest one. `sluice config schema` prints the same as JSON schema.\n",
    ]
    seen: dict[type[Part], str] = {}

    def visit(part: type[Part], where: str) -> None:
        if part in seen:
            return
        seen[part] = where
        lines.extend(section(part, where or "the recipe itself"))
        for name, field in part.model_fields.items():
            many = "[]" if kind_of(field.annotation).startswith("list of") else ""
            for inner in parts_in(field.annotation):
                visit(inner, f"{where}.{name}{many}".removeprefix("."))

    visit(RunConfig, "")
    return "\n".join(lines).rstrip() + "\n"


# ── the commands ────────────────────────────────────────────────────────────────────────────────────────────


def command_section(command: Any, path: str) -> Iterator[str]:
    """One command: what it does, its arguments and options; then those below it."""
    below = getattr(command, "commands", None)
    if below is None:
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        usage = " ".join([path, *(argument_name(each) for each in arguments)])
        yield f"## `{path}`\n\n{(command.help or '').strip()}\n\n```\n{usage} [OPTIONS]\n```\n"
        yield "| | meaning |\n|---|---|"
        for each in command.params:
            if each.param_type_name == "argument":
                yield f"| `{argument_name(each)}` | {cell(getattr(each, 'help', '') or '')} |"
            elif not getattr(each, "hidden", False):
                value = (
                    "" if each.is_flag else f" {each.metavar or VALUES.get(each.type_descriptor.annotation, 'TEXT')}"
                )
                names = ", ".join(f"`{name}{value}`" for name in (*each.opts, *each.secondary_opts))
                yield f"| {names} | {cell(each.help or '')} |"
        yield ""
        return
    for name, inner in below.items():
        yield from command_section(inner, f"{path} {name}")


def argument_name(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    many = "…" if argument.nargs == -1 else ""
    return f"{name}{many}" if argument.required else f"[{name}{many}]"


def cli_page() -> str:
    """Every command with its arguments and options."""
    head = [
        "# Commands\n",
        "Every command of `sluice`, made from the code by `make docs`; `sluice COMMAND --help` prints the same.",
        "Exit codes: 0 done, 2 a wrong command or flag, 130 interrupted; [errors of a run](../outputs.md#exit-codes)",
        "have codes of their own.\n",
    ]
    return "\n".join([*head, *command_section(typer.main.get_command(app), "sluice")]).rstrip() + "\n"


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    return {FOLDER / "configuration.md": config_page(), FOLDER / "commands.md": cli_page()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
