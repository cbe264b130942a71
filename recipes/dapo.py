"""The demo with DAPO, all four parts of it: clip higher, token-level loss, dynamic sampling, overlong punishment.

`type = "dapo"` brings three; dynamic sampling is the group filter `spread`: a group whose answers are all right or all
wrong is dropped, and another one is sampled in its place. The punishment begins at 24 of an answer's 30 tokens.

    sluice train recipes/dapo.py
"""

from __future__ import annotations

from typing import Any

from demo import recipe as demo_recipe


def recipe() -> dict[str, Any]:
    """`demo.py` with another algorithm and a filter."""
    base = demo_recipe()
    base["name"] = "dapo"
    base["algorithm"] = {"type": "dapo", "updates_per_batch": 2, "overlong": {"buffer": 6}}
    base["data"]["filters"] = [{"type": "spread"}]
    base["steps"] = 25
    return base
