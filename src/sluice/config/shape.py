"""What the configuration's types say about a dotted key: its owner, its valid neighbours, its default."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias, Union, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from sluice.config.base import Part
from sluice.config.lines import Key
from sluice.config.run import RunConfig

Table: TypeAlias = dict[str, Any]
"""A part of a recipe as it is written down: what a TOML table or a dict literal holds."""


def as_table(value: object) -> Table | None:
    """`value` if it is a dict, else None."""
    return cast(Table, value) if isinstance(value, dict) else None


def as_list(value: object) -> list[Any] | None:
    """`value` as a list if it is a list or tuple, else None."""
    return list(cast(Sequence[Any], value)) if isinstance(value, list | tuple) else None


def dotted(key: Key) -> str:
    """`("rewards", 0, "weight")` → `rewards.0.weight`."""
    return ".".join(str(part) for part in key)


def alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, `Annotated` and `Optional` taken off; a plain type is its only member."""
    if get_origin(annotation) is Annotated:
        yield from alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from alternatives(member)
    else:
        yield annotation


def parts_of(annotation: Any) -> list[type[Part]]:
    """The config classes that a field may hold."""
    return [kind for kind in alternatives(annotation) if isinstance(kind, type) and issubclass(kind, Part)]


def item_of(annotation: Any, index: int) -> Any:
    """Type of a list's item, `Any` when the field is no list."""
    for kind in alternatives(annotation):
        if get_origin(kind) is tuple:
            items = get_args(kind)
            is_uniform = len(items) == 2 and items[1] is Ellipsis
            return items[0] if is_uniform else items[index] if index < len(items) else Any
    return Any


def tag_of(part: type[Part]) -> str:
    """The value of `type` that selects this class; empty for a class that is not part of a union."""
    field = part.model_fields.get("type")
    return "" if field is None else str(field.default)


def is_text(annotation: Any) -> bool:
    """True when a value typed at the command line is to be taken as it stands: strings and paths."""
    kinds = [kind for kind in alternatives(annotation) if kind is not type(None)]
    return bool(kinds) and all(_is_text_type(kind) for kind in kinds)


def _is_text_type(kind: Any) -> bool:
    if get_origin(kind) is not None:
        return all(isinstance(value, str) for value in get_args(kind)) and get_origin(kind) is not tuple
    return isinstance(kind, type) and issubclass(kind, str | Path | Enum)


def allows_none(annotation: Any) -> bool:
    """True when the field may be None."""
    return any(kind is type(None) for kind in alternatives(annotation))


class Spot(NamedTuple):
    """A key as its user wrote it, the class that owns its last part, and the type of what it holds."""

    key: Key
    owner: type[Part] | None
    annotation: Any


def locate(loc: Sequence[str | int], root: type[Part] = RunConfig) -> Spot:
    """What a pydantic error location inside `root` means.

    Pydantic names the chosen member of a union on the way (`rewards, 0, numeric, abs_tol`); users do not.
    """
    annotation: Any = root
    key: Key = ()
    owner: type[Part] | None = None
    for step in loc:
        options = parts_of(annotation)
        chosen = [option for option in options if tag_of(option) == step and len(options) > 1]
        if chosen:
            annotation = chosen[0]
            continue
        key = (*key, step)
        owner = options[0] if len(options) == 1 else None
        if isinstance(step, int):
            annotation = item_of(annotation, step)
        elif owner is not None and step in owner.model_fields:
            annotation = owner.model_fields[step].annotation
        else:
            annotation = Any
    return Spot(key, owner, annotation)


def field_at(key: Key, tree: Table) -> FieldInfo | None:
    """The field that a user's key means in a recipe, None when there is none (a free-form or unknown key)."""
    annotation: Any = RunConfig
    field: FieldInfo | None = None
    node: Any = tree
    for step in key:
        if isinstance(step, int):
            annotation, field = item_of(annotation, step), None
            items = as_list(node) or []
            node = items[step] if step < len(items) else None
            continue
        table = as_table(node) or {}
        owner = chosen_part(annotation, table, field)
        field = owner.model_fields.get(step) if owner else None
        if field is None and step == "type" and parts_of(annotation):
            field = parts_of(annotation)[0].model_fields.get("type")
        annotation = Any if field is None else field.annotation
        node = table.get(step)
    return field


def chosen_part(annotation: Any, table: Table, field: FieldInfo | None) -> type[Part] | None:
    """The class that `table` is meant for: by its `type`, else by the field's default, else the only one."""
    options = parts_of(annotation)
    if len(options) <= 1:
        return options[0] if options else None
    default = field.default if field is not None else None
    tag = table.get("type", tag_of(type(default)) if isinstance(default, Part) else None)
    return next((option for option in options if tag_of(option) == tag), None)


def fill_defaults(annotation: Any, value: Any, field: FieldInfo | None = None) -> Any:
    """Completes tables with what the field's default sets, so that a table changes a default, not resets it.

    `[data.strategy]` with `samples = 16` alone keeps `type = "groups"`. A table of another `type` than the
    default's takes nothing from it.
    """
    items = as_list(value)
    if items is not None:
        return [fill_defaults(item_of(annotation, index), item) for index, item in enumerate(items)]
    table = as_table(value)
    part = chosen_part(annotation, table, field) if table is not None else None
    if table is None or part is None:
        return value
    default = field.default if field is not None else None
    merged = {**as_written(default), **table} if isinstance(default, part) else dict(table)
    for name, inner in part.model_fields.items():
        if name in merged:
            merged[name] = fill_defaults(inner.annotation, merged[name], inner)
    return merged


def as_written(part: Part) -> Table:
    """The dict form of a config object: what was set explicitly, and every `type`."""
    names = [name for name in type(part).model_fields if name in part.model_fields_set or name == "type"]
    return {name: _plain(getattr(part, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return as_written(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    items = as_list(value)
    if items is not None:
        return [_plain(item) for item in items]
    table = as_table(value)
    return {name: _plain(item) for name, item in table.items()} if table is not None else value


def known_keys(annotation: Any = RunConfig, prefix: Key = ()) -> Iterator[Key]:
    """Every dotted key that some configuration may have; list items are left out."""
    for part in parts_of(annotation):
        for name, field in part.model_fields.items():
            yield (*prefix, name)
            yield from known_keys(field.annotation, (*prefix, name))


def part_named(name: str) -> type[Part]:
    """The config class of this name; `RunConfig` when there is none."""
    kinds: list[type[Part]] = [RunConfig]
    for kind in kinds:  # grows while it is walked
        inner = [part for field in kind.model_fields.values() for part in nested_parts(field.annotation)]
        kinds += [part for part in dict.fromkeys(inner) if part not in kinds]
    return next((kind for kind in kinds if kind.__name__ == name), RunConfig)


def nested_parts(annotation: Any) -> list[type[Part]]:
    """The config classes that a field may hold, as its value or as items of its list."""
    return parts_of(annotation) + parts_of(item_of(annotation, 0))
