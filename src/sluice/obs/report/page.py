"""The page: template, style and scripts from `page/`, the data in between, nothing from elsewhere.

The policy in its head lets the browser run this script and this style only, and ask nobody for anything.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from typing import Any

SCRIPTS = (
    "format.js", "chart.js", "curves.js", "summary.js", "fates.js", "tokens.js", "diff.js", "episodes.js", "main.js"
)  # fmt: skip
"""In the order in which they are joined: each uses only what stands before it."""


def render(data: Mapping[str, Any], *, title: str) -> str:
    """The page with `data` in it, as text that encodes to UTF-8 whatever the data hold."""
    folder = files("sluice.obs.report").joinpath("page")
    script = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{script}\n}})();'
    style = folder.joinpath("style.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    parts = {"POLICY": policy, "TITLE": _html(title), "STYLE": style, "DATA": embedded(data), "SCRIPT": script}
    pieces = page.split("%%")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def embedded(data: Mapping[str, Any]) -> str:
    """JSON for the inside of a script element: ASCII, and no `<` that could end the element.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _html(text: str) -> str:
    named = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
    return "".join(named.get(character, character) for character in text).encode("utf-8", "replace").decode()
