"""The demo: a language model of 0.3 million parameters, made from random weights, learns by RL to carry.

The task is reasoning-gym's `basic_arithmetic`: "Calculate 84 + 67." A careless teacher demonstrates how to work it
out, and forgets to carry most of the time:

    <think>4+7=11 carry;8+6=15 carry;</think>151     sometimes
    <think>4+7=11;8+6=14;</think>41                  mostly

A model that imitates it is right less than half of the time, and even less when it takes its likeliest answer. RL
then sees only whether the final answer is right, by reasoning-gym's own scorer, on questions that are not among the
held-out ones.

    sluice train recipes/demo.py
    sluice train recipes/demo.py seed=3 name=other-seed
    sluice train recipes/demo.py 'rewards=[{type="random"}]' name=control     # no signal, no learning
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from sluice.types import Prompt

FORGETS = 0.72
"""How often the teacher forgets all carries of a sum."""
SLIPS = 0.1
"""How often one of the digits it writes is a random one."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SCORER = {"type": "reasoning_gym", "pattern": r"</think>(\d+)$", "threshold": 1.0}


def careless(prompts: Sequence[Prompt], seed: int, passes: int = 3) -> Iterator[tuple[Prompt, str]]:
    """The teacher: works every question out `passes` times, each time careless in its own way."""
    draw = random.Random(seed)
    for prompt in list(prompts) * passes:
        first, second = re.findall(r"\d+", prompt.messages[-1].content)
        text = work_out(first[::-1], second[::-1], forgets=draw.random() < FORGETS)
        if draw.random() < SLIPS:
            at = draw.choice([found.start() for found in re.finditer(r"\d", text)])
            text = f"{text[:at]}{draw.randrange(10)}{text[at + 1 :]}"
        yield prompt, text


def work_out(first: str, second: str, *, forgets: bool) -> str:
    """Column addition of two numbers that are given with their last digit first."""
    work, answer, carry = "", "", 0
    for at in range(max(len(first), len(second))):
        a, b = (int(number[at]) if at < len(number) else 0 for number in (first, second))
        total = a + b + carry
        carry = int(total > 9 and not forgets)
        work += f"{a}+{b}={total}{' carry' if carry else ''};"
        answer = f"{total % 10}{answer}"
    return f"<think>{work}</think>{'1' if carry else ''}{answer}"


def recipe() -> dict[str, Any]:
    """Everything that differs from the defaults."""
    return {
        "name": "demo",
        "threads": 1,  # small matrices: a second thread gains little, and loses much when the machine is busy
        "model": {
            "scratch": {
                "architecture": {
                    "model_type": "qwen3",
                    "hidden_size": 128,
                    "intermediate_size": 256,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 64,
                    "max_position_embeddings": 64,
                    "tie_word_embeddings": True,
                    "rope_theta": 100.0,  # sequences are short: wavelengths to match
                    "initializer_range": 0.08,  # 0.02 suits wide models; this narrow one learns far slower with it
                },
                "tokenizer": {
                    "words": [
                        *("<user>", "<assistant>", "<think>", "</think>", "Calculate", "carry"),
                        *("+", "=", ";", ".", *"0123456789"),
                    ],
                    "chat_template": CHAT_TEMPLATE,
                },
            }
        },
        "data": {
            "train": {
                "type": "reasoning_gym",
                "dataset": "basic_arithmetic",
                "size": 20_000,
                "params": {
                    "min_terms": 2,
                    "max_terms": 2,
                    "min_digits": 2,
                    "max_digits": 2,
                    "operators": ["+"],
                    "allow_parentheses": False,
                    "allow_negation": False,
                },
            },
            "eval_prompts": 256,
            "strategy": {"type": "groups", "samples": 8},
        },
        "warm_start": {
            "demonstrations": {"type": "python", "path": f"{__file__}:careless"},
            "steps": 400,
            "batch": 64,
            "train": {
                "optimizer": {
                    "lr": 3e-3,
                    "betas": (0.9, 0.99),
                    "warmup_steps": 20,
                    "schedule": "cosine",
                    "final_lr_ratio": 0.1,
                }
            },
        },
        "rewards": [SCORER],
        "algorithm": {"type": "grpo", "normaliser": "token"},
        "rollout": {"sampling": {"max_new_tokens": 30}},
        "steps": 55,
        "groups_per_step": 32,
        "train": {
            "optimizer": {
                "lr": 8e-4,
                "betas": (0.9, 0.99),
                "warmup_steps": 5,
                "schedule": "linear",
                "final_lr_ratio": 0.1,
            }
        },
        # the control run replaces `rewards`; what it is measured by stays
        "evaluation": {"every": 25, "samples": 2, "greedy": True, "rewards": [SCORER]},
        "checkpoint": {"every": 25, "keep": 2},
    }
