"""The tool recipe with an agent that is a program of its own: `examples/calculator_agent.py`, unchanged.

It is started once per episode, with a URL and a key in its environment, and talks to the model by the `openai` package.
Afterwards `examples/verify_sum.py` looks at the file it left and gives the rewards.

    sluice train recipes/agent.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tools import recipe as tools_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"


def recipe() -> dict[str, Any]:
    """`tools.py` with another runner and other rewards."""
    base = tools_recipe()
    base["name"] = "agent"
    base["rollout"]["runner"] = {
        "type": "command",
        "command": [sys.executable, str(EXAMPLES / "calculator_agent.py")],
        "verify": [sys.executable, str(EXAMPLES / "verify_sum.py")],
        "seconds": 120.0,
        "parallel": 4,
    }
    base["rewards"] = [
        {"type": "given", "name": "correct", "component": "correct"},
        {"type": "given", "name": "tidy", "component": "tidy", "weight": 0.1},
    ]
    base["data"]["eval_prompts"] = 16
    base["data"]["strategy"]["samples"] = 4
    base |= {"steps": 10, "groups_per_step": 4, "evaluation": {"every": 0}}
    return base
