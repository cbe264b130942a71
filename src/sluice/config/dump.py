"""A resolved configuration as TOML or JSON; either is a recipe again and gives the same configuration."""

from __future__ import annotations

import json
import re
from typing import Any

from sluice.config.run import RunConfig
from sluice.config.shape import Table, as_list, as_table
from sluice.errors import ConfigError

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def resolved_json(config: RunConfig) -> str:
    """Every value of `config`, defaults included, as indented JSON."""
    return json.dumps(_values(config), indent=2, ensure_ascii=False) + "\n"


def resolved_toml(config: RunConfig) -> str:
    """Every value of `config`, defaults included, as a TOML recipe.

    TOML has no null: keys that are None stand in comments; None is the default wherever a key is Sluice's.
    """
    lines: list[str] = []
    _write_table(_values(config), "", lines)
    return "\n".join(lines).strip() + "\n"


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, with what each key means and its default."""
    return RunConfig.model_json_schema()


def _values(config: RunConfig) -> Table:
    return config.model_dump(mode="json")


def _write_table(table: Table, prefix: str, lines: list[str]) -> None:
    """Plain values first, as TOML wants it, then tables and arrays of tables under their headers."""
    nested: list[tuple[str, Table | list[Table]]] = []
    for name, value in table.items():
        inner = as_table(value)
        items = _tables(value)
        if inner is not None:
            nested.append((name, inner))
        elif items is not None:
            nested.append((name, items))
        elif value is None:
            lines.append(f"# {_key(name)} = none")
        else:
            lines.append(f"{_key(name)} = {_inline(value, prefix + name)}")
    for name, inner in nested:
        path = f"{prefix}{_key(name)}"
        if isinstance(inner, dict):
            lines += ["", f"[{path}]"]
            _write_table(inner, f"{path}.", lines)
            continue
        for item in inner:
            lines += ["", f"[[{path}]]"]
            _write_table(item, f"{path}.", lines)


def _tables(value: object) -> list[Table] | None:
    items = as_list(value)
    tables = [table for item in items or [] if (table := as_table(item)) is not None]
    return tables if items and len(tables) == len(items) else None


def _inline(value: Any, where: str) -> str:
    if value is None:
        raise ConfigError(
            f"{where} holds a null, which TOML cannot express",
            hint="`sluice config show RECIPE --json` prints it",
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    items, table = as_list(value), as_table(value)
    if items is not None:
        return f"[{', '.join(_inline(item, where) for item in items)}]"
    if table is not None:
        pairs = (f"{_key(name)} = {_inline(item, f'{where}.{name}')}" for name, item in table.items())
        return f"{{{', '.join(pairs)}}}"
    return repr(value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _inline(name, name)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as dotted keys."""
    table, items = as_table(value), as_list(value)
    inner = table or dict(enumerate(items or ()))
    if not inner:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, each in inner.items():
        flat |= flatten(each, f"{prefix}.{key}" if prefix else str(key))
    return flat
