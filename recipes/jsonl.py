"""Your own questions and your own model: GRPO on a JSONL file, one point for the exact answer.

sluice train recipes/jsonl.py data.train.path=questions.jsonl model.path=path/to/model
"""

from __future__ import annotations

from typing import Any


def recipe() -> dict[str, Any]:
    """Everything but the file and the model, which the command line names."""
    return {
        "name": "jsonl",
        "model": {"path": "model"},
        "data": {
            "train": {"type": "jsonl", "path": "questions.jsonl"},
            "eval_prompts": 2,
            "strategy": {"type": "groups", "samples": 8},
        },
        "rewards": [{"type": "exact"}],
        "algorithm": {"type": "grpo"},
        "rollout": {"sampling": {"max_new_tokens": 32}},
        "groups_per_step": 4,
        "train": {"optimizer": {"lr": 1e-5}},
    }
