"""A run small enough for tests: a tiny random model that answers one-digit questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sluice.config import RunConfig

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SCRATCH: dict[str, Any] = {
    "architecture": {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "tokenizer": {"words": ["<user>", "<assistant>", "+", "=", *"0123456789"], "chat_template": TEMPLATE},
}


def rows(count: int = 40) -> list[dict[str, str]]:
    """Questions whose sum has one digit."""
    pairs = [(a, b) for a in range(10) for b in range(10) if a + b < 10]
    return [{"id": f"q{a}{b}", "prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs[:count]]


def tiny(folder: Path, **changes: Any) -> RunConfig:
    """A config whose run folder is `folder/runs/tiny`; `changes` are merged in, nested dictionaries too."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "questions.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    base: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "threads": 1,
        "device": "cpu",
        "model": {"scratch": SCRATCH},
        "data": {
            "train": {"type": "jsonl", "path": str(source)},
            "eval_prompts": 8,
            "strategy": {"type": "groups", "samples": 4},
        },
        "rewards": [{"type": "exact"}, {"type": "random"}],  # a coin by episode id: every batch has a gradient
        "rollout": {"sampling": {"max_new_tokens": 6}, "embedded": {"kv_tokens": 8192}},
        "steps": 6,
        "groups_per_step": 4,
        "train": {"optimizer": {"lr": 3e-3}},
        "evaluation": {"every": 3, "greedy": True},
        "checkpoint": {"every": 2, "keep": 2},
        "obs": {"tensorboard": False, "report": False, "live": False},
    }
    return RunConfig.model_validate(merge(base, changes))


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`; dictionaries are merged, None takes a key out, everything else is replaced."""
    merged = {key: value for key, value in base.items() if changes.get(key, value) is not None}
    for key, value in changes.items():
        if value is None:
            continue
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
