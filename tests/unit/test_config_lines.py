"""The scanner that knows where a TOML key stands, against documents of every form and against tomllib."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sluice.config.dump import _write_table
from sluice.config.lines import Key, key_lines

DOCUMENT = '''# comment = 1
a = 1 # b = 2
"quoted key" = "x = 1 # not a comment"
'lit.eral' = 'c:\\dir'
d.e . f = [1, 2, # [no.table]
  { g = 3, h.i = "]" },
  """multi " line = 1
[nor.this]
""""]

[t . "u.v"] # header
w = \'\'\'
[x]
y = 1\'\'\'
when = 1979-05-27 07:32:00
empty = {}

[[p]]
q = 1
[[p.r]]
s = 1
[[p.r]]
s = 2
[[p]]
[p.k]
"\\u00e9\\"" = inf
'''


def test_every_form() -> None:
    assert key_lines(DOCUMENT) == {
        ("a",): 2,
        ("quoted key",): 3,
        ("lit.eral",): 4,
        ("d",): 5,
        ("d", "e"): 5,
        ("d", "e", "f"): 5,
        ("d", "e", "f", 0): 5,
        ("d", "e", "f", 1): 5,
        ("d", "e", "f", 2): 6,
        ("d", "e", "f", 2, "g"): 6,
        ("d", "e", "f", 2, "h"): 6,
        ("d", "e", "f", 2, "h", "i"): 6,
        ("d", "e", "f", 3): 7,
        ("t", "u.v"): 11,
        ("t", "u.v", "w"): 12,
        ("t", "u.v", "when"): 15,
        ("t", "u.v", "empty"): 16,
        ("p",): 18,
        ("p", 0): 18,
        ("p", 0, "q"): 19,
        ("p", 0, "r"): 20,
        ("p", 0, "r", 0): 20,
        ("p", 0, "r", 0, "s"): 21,
        ("p", 0, "r", 1): 22,
        ("p", 0, "r", 1, "s"): 23,
        ("p", 1): 24,
        ("p", 1, "k"): 25,
        ("p", 1, "k", 'é"'): 26,
    }
    assert tomllib.loads(DOCUMENT)


def test_line_ends_of_windows() -> None:
    assert key_lines("a = 1\r\nb = '''\r\n'''\r\nc = 1\r\n") == {("a",): 1, ("b",): 2, ("c",): 4}


def test_no_line_end_at_the_end() -> None:
    assert key_lines("a = 1") == {("a",): 1}
    assert key_lines("") == {}
    assert key_lines("# only this") == {}


def leaves(value: Any, key: Key = ()) -> set[Key]:
    """Keys of everything that is not a table or list, and of empty ones."""
    if isinstance(value, dict) and value:
        return {found for name, inner in value.items() for found in leaves(inner, (*key, name))}
    if isinstance(value, list) and value:
        return {found for index, inner in enumerate(value) for found in leaves(inner, (*key, index))}
    return {key} if key else set()


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=6)
VALUES = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_every_key_of_a_written_document_is_found(tree: dict[str, Any]) -> None:
    lines: list[str] = []
    _write_table(tree, "", lines)
    document = "\n".join(lines)
    assert tomllib.loads(document) == tree
    found = key_lines(document)
    assert leaves(tree) <= found.keys()
    assert all(1 <= line <= len(lines) for line in found.values())
