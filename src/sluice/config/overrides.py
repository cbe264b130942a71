"""Dotted overrides, `train.optimizer.lr=1e-3`: TOML values that are put into a recipe before validation."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any, cast

from sluice.config.lines import Key
from sluice.config.shape import Table, allows_none, as_table, dotted, field_at, is_text, item_of

_NONE = ("none", "None", "null")


class OverrideError(ValueError):
    """An override cannot be parsed or applied; `place` says which. Collected by the loader."""

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True, slots=True)
class Override:
    """One `KEY=VALUE`, and how an error message refers to it."""

    key: str
    text: str
    place: str

    @classmethod
    def parse(cls, argument: str) -> Override:
        """Splits `KEY=VALUE` at the first `=`. Raises OverrideError when there is none."""
        key, equals, text = argument.partition("=")
        place = f"override {argument!r}"
        if not equals or not key.strip():
            raise OverrideError(f"{argument!r} is not KEY=VALUE, such as train.optimizer.lr=1e-4", place)
        return cls(key.strip(), text.strip(), place)

    def apply(self, tree: Table) -> list[Key]:
        """Puts the value into `tree`, making tables on the way, and returns the keys it made: its own last."""
        node: Any = tree
        key: Key = ()
        made: list[Key] = []
        steps = self._steps()
        for number, name in enumerate(steps):
            step = self._step(name, key, node, tree)
            key = (*key, step)
            if number == len(steps) - 1:
                self._put(node, step, self._value(key, tree))
                made.append(key)
                continue
            if self._get(node, step) is None:
                made.append(key)
            node = self._descend(node, step, key, tree)
        return made

    def _steps(self) -> list[str]:
        """The parts of the key; a part with a dot in it is quoted, as in TOML."""
        try:
            node: Any = tomllib.loads(f"{self.key} = 0")
        except tomllib.TOMLDecodeError as error:
            raise OverrideError(f"{self.key!r} is not a dotted key", self.place) from error
        steps: list[str] = []
        while (table := as_table(node)) is not None:
            name, node = next(iter(table.items()))
            steps.append(name)
        return steps

    def _step(self, name: str, parent: Key, node: Any, tree: Table) -> str | int:
        field = field_at(parent, tree) if parent else None
        is_item = isinstance(node, list) or (not node and field is not None and item_of(field.annotation, 0) is not Any)
        if not is_item:
            return name
        if not name.isdecimal():
            raise OverrideError(f"{dotted(parent)} is a list: {name!r} is not a position in it", self.place)
        return int(name)

    def _descend(self, node: Any, step: str | int, key: Key, tree: Table) -> Any:
        child: Any = self._get(node, step)
        if child is None or (child == {} and not isinstance(step, int)):
            field = field_at(key, tree)
            child = [] if field is not None and item_of(field.annotation, 0) is not Any else {}
            self._put(node, step, child)
        if not isinstance(child, dict | list):
            raise OverrideError(f"{dotted(key)} is {child!r}: nothing can be set inside it", self.place)
        return cast(Any, child)

    def _get(self, node: Any, step: str | int) -> Any:
        if isinstance(step, str):
            return node.get(step)
        return node[step] if step < len(node) else None

    def _put(self, node: Any, step: str | int, value: Any) -> None:
        if isinstance(step, str) or step < len(node):
            node[step] = value
        elif step == len(node):
            node.append(value)
        else:
            raise OverrideError(f"there is no item {step}: the list has {len(node)}", self.place)

    def _value(self, key: Key, tree: Table) -> Any:
        """The text as a TOML value; as it stands when it is none, or when the field holds text."""
        field = field_at(key, tree)
        if self.text in _NONE and field is not None and allows_none(field.annotation):
            return None
        try:
            parsed = tomllib.loads(f"value = {self.text}")
        except tomllib.TOMLDecodeError:
            return self.text
        value = parsed["value"]
        wants_text = field is not None and is_text(field.annotation)
        is_one_value = len(parsed) == 1 and (isinstance(value, str) or not wants_text)
        return value if is_one_value else self.text
