"""Several turns and a tool: an agent program gives SmolLM2-135M-Instruct a calculator, and RL teaches it to use it.

    sluice models fetch smollm2
    sluice engines install sglang --cuda
    sluice train recipes/smollm2_tools.py

The agent is `examples/calculator_words.py`, a plain program that uses the `openai` package and knows nothing of
Sluice: it is started once per episode with a base URL and a key. The model's chat template knows no tools, so the agent
speaks plain text with the model: `CALC: 12 + 30` is answered with `RESULT: 42`, `ANSWER: 42` ends the conversation.
Sums of three terms with two digits are beyond this model without the tool.

`recipes/smollm2_tools.py:gpu_host` is the same run on a host that `benchmarks/gpu/setup.sh` prepared.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from smollm2 import on_gpu_host, sums
from smollm2 import recipe as single_turn

AGENT = Path(__file__).parents[1] / "examples" / "calculator_words.py"
SCORER = {"type": "reasoning_gym", "pattern": r"ANSWER: *(-?\d+)", "threshold": 1.0}


def recipe() -> dict[str, Any]:
    """The single-turn recipe with another task, another reward and an agent."""
    base = single_turn()
    rollout = {
        **base["rollout"],
        "context_length": 1024,
        "sampling": {"max_new_tokens": 32},
        "chat": {"format": "none"},
        "runner": {"type": "command", "command": [sys.executable, str(AGENT)], "seconds": 120, "parallel": 16},
    }
    return {
        **base,
        "name": "smollm2-tools",
        "data": {
            "train": sums(3, 3_000, digits=2),
            "eval_prompts": 32,
            "strategy": {"type": "groups", "samples": 8},
        },
        "rewards": [SCORER],
        "rollout": rollout,
        "steps": 12,
        "groups_per_step": 16,
        "evaluation": {"every": 6, "samples": 1},
    }


def gpu_host() -> dict[str, Any]:
    """The same on a host without a registry; see `smollm2.py`."""
    return on_gpu_host(recipe())
