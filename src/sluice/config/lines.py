"""Where each key of a TOML document stands: `train.optimizer.lr` → line 12.

`tomllib` parses but forgets lines. This scanner walks a document that `tomllib` has accepted, so it only has
to find keys and skip values; it never judges.
"""

from __future__ import annotations

import re
from typing import TypeAlias

Key: TypeAlias = tuple[str | int, ...]
"""A dotted key as its parts; list positions are ints."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}


def key_lines(text: str) -> dict[Key, int]:
    """Line numbers (from 1) of every table header, key and list item of a valid TOML document."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines: dict[Key, int] = {}
        self._lengths: dict[Key, int] = {}  # of arrays of tables

    def scan(self) -> dict[Key, int]:
        table: Key = ()
        while True:
            self._skip_blank()
            if self._at >= len(self._text):
                return self._lines
            if self._text.startswith("[", self._at):
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> Key:
        is_array = self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        parts = self._dotted()
        self._at += 2 if is_array else 1
        key: Key = ()
        for part in parts[:-1]:
            key = self._last_item((*key, part))
        key = (*key, parts[-1])
        if is_array:
            self._note(key)
            self._lengths[key] = self._lengths.get(key, 0) + 1
        key = self._last_item(key)
        self._note(key)
        return key

    def _last_item(self, key: Key) -> Key:
        """The table that `key` means: the last one when it names an array of tables."""
        length = self._lengths.get(key)
        return key if length is None else (*key, length - 1)

    def _pair(self, table: Key) -> None:
        key = table
        line = self._line()
        for part in self._dotted():
            key = (*key, part)
            self._lines.setdefault(key, line)
        self._at += 1  # "="
        self._value(key)

    def _value(self, key: Key) -> None:
        self._skip_spaces()
        char = self._text[self._at]
        if char in "\"'":
            self._string()
        elif char == "[":
            self._items(key)
        elif char == "{":
            self._inline_table(key)
        else:
            match = _SCALAR.match(self._text, self._at)
            assert match is not None  # the pattern matches the empty string
            self._at = match.end()

    def _items(self, key: Key) -> None:
        self._at += 1
        index = 0
        while True:
            self._skip_blank()
            if self._text[self._at] == "]":
                self._at += 1
                return
            if self._text[self._at] == ",":
                self._at += 1
                continue
            item = (*key, index)
            self._note(item)
            self._value(item)
            index += 1

    def _inline_table(self, key: Key) -> None:
        self._at += 1
        while True:
            self._skip_blank()
            if self._text[self._at] == "}":
                self._at += 1
                return
            if self._text[self._at] == ",":
                self._at += 1
                continue
            self._pair(key)

    def _dotted(self) -> list[str]:
        """Parts of a dotted key; stops in front of `=` or `]`."""
        parts: list[str] = []
        while True:
            self._skip_spaces()
            if self._text[self._at] in "\"'":
                parts.append(self._string())
            else:
                match = _BARE_KEY.match(self._text, self._at)
                assert match is not None, "tomllib accepted this document"
                self._at = match.end()
                parts.append(match.group())
            self._skip_spaces()
            if self._text[self._at] != ".":
                return parts
            self._at += 1

    def _string(self) -> str:
        """Skips a string of any of the four kinds; the text matters only where it is a key."""
        char = self._text[self._at]
        quote = char * 3 if self._text.startswith(char * 3, self._at) else char
        self._at += len(quote)
        text: list[str] = []
        while not self._text.startswith(quote, self._at):
            if self._text[self._at] == "\\" and char == '"':
                text.append(self._escape())
            else:
                text.append(self._text[self._at])
                self._at += 1
        self._at += len(quote)
        while len(quote) == 3 and self._text.startswith(char, self._at):  # '""""' ends with a quote of its own
            self._at += 1
        return "".join(text)

    def _escape(self) -> str:
        letter = self._text[self._at + 1]
        digits = {"u": 4, "U": 8}.get(letter, 0)
        code = self._text[self._at + 2 : self._at + 2 + digits]
        self._at += 2 + digits
        return chr(int(code, 16)) if digits else _ESCAPES.get(letter, "")

    def _skip_spaces(self) -> None:
        while self._text[self._at : self._at + 1] in (" ", "\t"):
            self._at += 1

    def _skip_blank(self) -> None:
        """Spaces, line ends and comments."""
        while self._at < len(self._text):
            if self._text[self._at] == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif self._text[self._at] in " \t\n":
                self._at += 1
            else:
                return

    def _note(self, key: Key) -> None:
        self._lines.setdefault(key, self._line())

    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1
